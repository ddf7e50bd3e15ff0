"""Packages that only an extra of the project installs."""

from importlib.util import find_spec


def require_extra(extra: str, *packages: str) -> None:
    """
    Says what to install, before an import of `packages` would fail halfway.

    Args:
        extra (`str`): `"train"`, `"evaluation"` or `"quantization"`, as in pyproject.toml.
        packages (`str`): Names as they are imported, of what is needed here. Nothing is imported.

    Raises:
        ModuleNotFoundError: naming the packages that are missing, and the extra that brings them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        names = " and ".join(f"`{package}`" for package in missing)
        raise ModuleNotFoundError(f'{names} not installed: pip install "llada-uni[{extra}]"', name=missing[0])
