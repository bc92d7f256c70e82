"""Numbers in words."""


def short(number: float, units: str) -> str:
    """With three digits: short(1234567, "kMBT") -> 1.23M."""
    for unit in ("", *units[:-1]):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}"


def binary(size: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"
