"""The one exception that means that the user, not the code, must change something."""


class ConfigError(ValueError):
    """What was asked for cannot be done; the message names the field and the mend.

    Entry points print the message without a traceback and exit with code 2.
    """
