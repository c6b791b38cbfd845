"""Numbers as a reader wants them: three significant digits, bytes in MB, and "not measured" for what is absent."""

import math

NOT_MEASURED = "not measured"


def as_number(value: object) -> float | None:
    """The value as a finite number; None for booleans, text, NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def say_number(value: object) -> str:
    """A number with three significant digits; whole numbers from 1000 on in full, with thousands separated."""
    number = as_number(value)
    if number is None:
        return NOT_MEASURED
    if number == 0:
        return "0"
    if abs(number) >= 999.5:
        return f"{number:,.0f}" if abs(number) < 1e15 else f"{number:.2e}"
    mantissa, _, exponent = f"{number:#.3g}".partition("e")
    return f"{mantissa.rstrip('.')}e{int(exponent)}" if exponent else mantissa.rstrip(".")


def say_count(value: object) -> str:
    """A whole number with thousands separated, never rounded."""
    number = as_number(value)
    return NOT_MEASURED if number is None else f"{number:,.0f}"


def say_rate(value: object) -> str:
    """A learning rate without padding zeros: 0.0002, not 0.000200."""
    number = as_number(value)
    return NOT_MEASURED if number is None else f"{number:.3g}".replace("e-0", "e-")


def say_bytes(value: object) -> str:
    """A size in MB (millions of bytes); kB below a tenth of one, GB from ten thousand on."""
    number = as_number(value)
    if number is None:
        return NOT_MEASURED
    if abs(number) < 1000:
        return f"{number:.0f} B"
    if abs(number) < 1e5:
        return f"{say_number(number / 1e3)} kB"
    return f"{say_number(number / 1e6)} MB" if abs(number) < 1e10 else f"{say_number(number / 1e9)} GB"


def say_percent(share: object) -> str:
    """A share from 0 to 1 in per cent, with a decimal only where it matters."""
    number = as_number(share)
    if number is None:
        return NOT_MEASURED
    digits = 0 if abs(number) >= 0.0995 or number == 0 else 2 if abs(number) < 0.00995 else 1
    return f"{number * 100:.{digits}f}%"


def say_seconds(value: object) -> str:
    """A duration: milliseconds, seconds, minutes or hours, whichever reads best."""
    number = as_number(value)
    if number is None:
        return NOT_MEASURED
    if number < 1:
        return f"{number * 1000:.0f} ms"
    if number < 60:
        return f"{say_number(number)} s"
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
