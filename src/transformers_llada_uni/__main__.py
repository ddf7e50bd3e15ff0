"""
The command `transformers`, which knows this package's models here: `python -m transformers_llada_uni serve MODEL`.

By itself it has no way to be told of other packages.
"""

from transformers.cli.transformers import main


if __name__ == "__main__":
    main()
