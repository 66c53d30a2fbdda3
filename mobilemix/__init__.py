"""mobilemix: PyTorch vision models that mix tokens with FFTs or state-space scans, exported and proven intact."""

__version__ = "0.1.0"
