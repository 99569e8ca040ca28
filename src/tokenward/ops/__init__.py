"""Pure tensor functions: every formula of the library, without files, devices, configs or model classes."""
