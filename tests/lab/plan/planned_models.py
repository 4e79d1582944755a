"""Models to plan without a process, with the defaults of `normuon plan`."""

from __future__ import annotations

from typing import Any

from normuon.distributed.cost import CostModel
from normuon_lab.plan.contents import PlanRequest, plan_contents, plan_model
from normuon_lab.plan.mesh import Mesh
from normuon_lab.plan.model_matrices import model_shapes

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def request_for(mesh: Mesh, **options: Any) -> PlanRequest:
    """The command's defaults but for `options`."""
    defaults = {
        "balance": "flops",
        "bucket_bytes": 2**28,
        "wire_dtype": "bfloat16",
        "cost_model": CostModel(),
    }
    return PlanRequest(mesh=mesh, **{**defaults, **options})


def contents_of(model: str, mesh: str, **options: Any) -> dict[str, Any]:
    """What `--json` would print, without a process."""
    request = request_for(Mesh.parse(mesh), **options)
    return plan_contents(plan_model(model_shapes(model), request))
