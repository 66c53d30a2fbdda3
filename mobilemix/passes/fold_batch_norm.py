"""Evaluation-mode batch norm folded into the convolution or linear map before it."""

from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult
from mobilemix.passes.channels import batch_norm
from mobilemix.passes.editing import Edit
from mobilemix.passes.maps import channel_axis, is_map, output_scaled, with_parameters


class FoldBatchNorm(Pass):
    """Fold batch norm into the linear map before it.

    A batch norm in evaluation mode is x·s + t per channel, s = weight / √(running_var + eps), t = bias − mean·s.

        before:  x (N, C, H, W) → conv2d w (K, C, h, w), b (K) → batch_norm (K) → y (N, K, H', W')
        after:   x (N, C, H, W) → conv2d w·s (K, C, h, w), b·s + t (K) → y (N, K, H', W')

    The same for conv1d, conv3d, their transposes and linear. The value between the two must have no other user. Folding
    is computed in float64 and rounded once. A batch norm that stands before a linear map is left to `FoldAffine`.
    """

    name = "fold_batch_norm"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without the batch norms that come after a linear map."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            norm = batch_norm(edit, node)
            if norm is None or len(norm.input.users) > 1:
                continue
            if is_map(edit, norm.input) and channel_axis(norm.input) == norm.axis:
                with edit.at(node):
                    folded = output_scaled(edit, norm.input, norm.scale, norm.shift)
                    edit.exchange(norm.output, with_parameters(edit, norm.input, *folded))
        return edit.finish()
