"""TensorRT and TensorRT for RTX. Imports nothing, because the process that parses and builds starts here."""
