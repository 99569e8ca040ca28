"""The pure tensor core: every formula of the library, tensors in and tensors out.

Nothing here knows a file, a device, a config or a model class.
"""
