"""What converting may raise."""


class ConvertError(Exception):
    """The model cannot be converted; the message names the file and what is wrong."""
