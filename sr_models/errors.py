"""The errors that a config, a folder of weights or an image can cause in this package."""


class ModelError(ValueError):
    """A model, its config or its weights is not as it must be; the message says what was found and what is allowed."""


class ImageFileError(ValueError):
    """An image file can't be read, or can't be written as asked; the message starts with its name."""
