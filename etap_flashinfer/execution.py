"""What a planned call does: checks of its tensors, the variant that serves it, the launch."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import cache_format, planning, reference, validation
from .planning import CheckedCall, IndexTensors, Plan
from .validation import Problem


class Executor:
    """Runs the planned calls of one wrapper on the ETAP kernel or the reference.

    Parameters
    ----------
    workspace : torch.Tensor
        The wrapper's, uint8, one dimension.

    Attributes
    ----------
    kernels : dict
        Entry points of the kernel's variants that were used so far, which know the workspace and
        what they keep.
    kept : dict
        What each of these variants keeps between calls: see :func:`make_kept_memory`.
    """

    def __init__(self, workspace: torch.Tensor) -> None:
        self.kernels: dict[planning.VariantKey, Callable[..., None]] = {}
        self.device = workspace.device
        self.kept: dict[planning.VariantKey, torch.Tensor] = {}
        self._workspace = workspace
        # Workspace and kept memory, and the index tensors of the last launch, are the same for many
        # calls, so they are converted but once. The kernel learns the stream from the others.
        self._converter: Callable[[torch.Tensor], Any]
        self._index: IndexTensors | None = None
        self._index_arguments: tuple[Any, ...] = ()

    def run(
        self,
        plan: Plan,
        inputs: tuple[Any, Any, Any, Any],
        scales: tuple[float, float],
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        return_lse: bool,
        lse_base_e: bool,
        *,
        is_etap: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Check the tensors of a call against its plan, and run the kernel or the reference.

        Parameters
        ----------
        plan : Plan
            Of the call.
        inputs : tuple
            Queries and cache as the wrapper's ``run`` takes them, each in two parts.
        scales : (float, float)
            Of ckv and of kpe.
        out, lse : torch.Tensor or None
            Receive the results; made here if not given.
        return_lse, lse_base_e : bool
            Whether the log-sum-exp is returned, and whether it is the natural one.
        is_etap : bool
            Whether the kernel runs; the reference otherwise.

        Raises
        ------
        ValueError, TypeError
            If a tensor is not as planned; nothing has been launched then.
        """
        call = plan.checked_call
        layout = validation.layout_of_inputs(inputs) if is_etap else ()
        if call is not None and layout == call.layout:
            if plan.problem.kv_cache_format is not None:
                inputs = (*inputs[:2], *cache_format.as_bytes(*inputs[2:]))
        else:
            inputs = _checked_inputs(plan.problem, inputs, self.device, is_etap)
            if is_etap and inputs[2].shape[0] == 0:
                inputs = (*inputs[:2], *cache_format.page_of_zeros(*inputs[2:]))
                layout = ()  # not to be remembered: the next such call needs a page, too
            call = _checked_call(plan, layout, inputs[0])
        if return_lse or lse is not None:
            validation.check_lse_mode(plan.lse_mode, lse_base_e)
        out_shape = call.out_shape
        if out is None:
            out = inputs[0].new_empty(*out_shape)  # parsed faster than torch.empty's arguments
        elif validation.layout_of(out) != call.out_layout:
            validation.check_out(out, out_shape, plan.problem.q_data_type, self.device)
            call.out_layout = validation.layout_of(out)
        if lse is None:
            if return_lse:
                lse = inputs[0].new_empty(*out_shape[:2], dtype=torch.float32)
        elif validation.layout_of(lse) != call.lse_layout:
            validation.check_lse(lse, out_shape[:2], self.device)
            call.lse_layout = validation.layout_of(lse)
        if out_shape[0] > 0:
            if is_etap:
                self._run_etap(plan, call, inputs, scales, out, lse, lse_base_e)
            else:
                reference.run(plan, inputs, scales, out, lse, lse_base_e)
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    def _run_etap(
        self,
        plan: Plan,
        call: CheckedCall,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        scales: tuple[float, float],
        out: torch.Tensor,
        lse: torch.Tensor | None,
        lse_base_e: bool,
    ) -> None:
        """Launch the kernel, on PyTorch's current stream of the device of the tensors."""
        if call.kernel is None:
            query_len = plan.max_query_len
            if query_len is None:
                query_len = -(-call.out_shape[0] // plan.batch_size)
            call.kernel = self.kernel(plan, query_len)
        if plan.index is not self._index:
            self._index_arguments = tuple(map(self._converter, plan.index))
            self._index = plan.index
        problem = plan.problem
        call.kernel(
            *inputs,
            *self._index_arguments,
            out,
            lse,
            problem.causal,
            problem.sm_scale,
            lse_base_e,
            *scales,
            plan.fixed_split_tiles,
        )

    def kernel(self, plan: Plan, query_len: int) -> Callable[..., None]:
        """Entry point of the variant that serves requests of ``query_len`` queries best.

        Loads those of short and of long requests together: no later plan waits for a compiler
        because requests have grown.
        """
        if (query_len, plan.is_long) not in plan.kernels:
            for is_long in (True, False):
                key = planning.variant_key(plan.problem, query_len, is_long)
                plan.kernels[query_len, is_long] = self._load_kernel(key)
        return plan.kernels[query_len, plan.is_long]

    def _load_kernel(self, key: planning.VariantKey) -> Callable[..., None]:
        """Entry point of a variant; compiled or loaded when it is first needed."""
        kernel = self.kernels.get(key)
        if kernel is None:
            from . import jit

            module = jit.get_etap_mla_module(jit.EtapMlaVariant(*key))
            validation.check_workspace_bytes(
                self._workspace, module.workspace_bytes(self.device.index)
            )
            kept = make_kept_memory(module.kept_bytes(self.device.index), self.device)
            self._converter = jit.argument_converter()
            buffers = map(self._converter, (self._workspace, kept))
            kernel = self.kernels[key] = functools.partial(module.run, *buffers)
            self.kept[key] = kept
        return kernel


def make_kept_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory for what a variant keeps between calls of one caller, which do not overlap.

    Nobody but this variant writes it: each CTA takes what it finds there for its own schedule, if
    it was made from the very numbers of this call, and what stands in a place for a part's result
    for just that. So it is no part of a workspace, which wrappers may share.

    Parameters
    ----------
    num_bytes : int
        What the module's ``kept_bytes`` asks for.
    device : torch.device
        Of the kernel.

    Returns
    -------
    torch.Tensor
        All bits ones, which says that there is nothing; uint8, shape ``[num_bytes]``.
    """
    kept = torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            # The first call may be on another stream, where it could meet half of these bits behind
            # half of what the memory's last owner, perhaps another kernel of ours, left there.
            # A capture allows no waiting, and its replays come after it.
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().synchronize()
    return kept


def _checked_call(plan: Plan, layout: validation.Layout, q_nope: torch.Tensor) -> CheckedCall:
    """What follows from inputs that passed their checks; left to the runs that follow."""
    total_queries = q_nope.shape[0]
    validation.check_total_queries(total_queries, plan.total_queries)
    problem = plan.problem
    call = CheckedCall(layout, (total_queries, problem.num_heads, problem.head_dim_ckv))
    if layout:
        plan.checked_call = call
    return call


def _checked_inputs(
    problem: Problem,
    inputs: tuple[Any, Any, Any, Any],
    device: torch.device,
    is_etap: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check queries and cache against the plan; return them as the kernel takes them."""
    q_nope, q_pe, ckv, kpe = inputs
    validation.check_queries(q_nope, q_pe, problem, device)
    ckv, kpe = cache_format.checked_cache(ckv, kpe, problem, device)
    if is_etap:
        validation.check_kernel_queries(q_nope, q_pe)
        cache_format.check_kernel_cache(ckv, kpe)
    return q_nope, q_pe, ckv, kpe
