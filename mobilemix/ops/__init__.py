"""State-space scans as operators: one node in a captured graph, with a reference that runs anywhere.

They are `torch.ops.mobilemix.selective_scan`, `.ssd_chunk_scan` and `.linear_scan`, and keep whole through
`torch.export`; `mobilemix.passes` writes them in plain operators. The functions here have the argument names and
defaults of mamba_ssm. The reference computes one time step after the other, in the dtype of its inputs but at least in
float32, and can be differentiated (once).
"""

from mobilemix.ops.linear_scan import linear_scan
from mobilemix.ops.selective_scan import selective_scan
from mobilemix.ops.ssd_chunk_scan import ssd_chunk_scan

__all__ = ["linear_scan", "selective_scan", "ssd_chunk_scan"]
