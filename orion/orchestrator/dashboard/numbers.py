"""How numbers are shortened before they travel. Pure."""


def short(value: float, digits: int = 4) -> float:
    """Rounded to so many significant digits: as much as people read."""
    return float(f"{value:.{digits}g}")


def short_or_none(value: float | None) -> float | None:
    return None if value is None else short(value)
