"""What the commands read and write. Options are tested in `tests/llada_uni/test_cli.py`."""
