"""Containers without llama.cpp's block types refuse them, and say what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from converters.errors import UsageError
from converters.passes.assign import assign_schemes
from converters.quantize.ggml.mixes import MIXES
from converters.quantize.scheme import SCHEMES
from converters.role import Role
from exporters.base import Target
from exporters.registry import EXPORTERS
from tests.exporters.tiny_checkpoints import make_model


@pytest.mark.parametrize("target", [target for target in Target if target is not Target.GGUF])
def test_ggml_schemes_are_refused(target: Target, tmp_path: Path) -> None:
    exporter = EXPORTERS[target]
    model = make_model("phi3_medium_gqa", tmp_path, "int8_g32", {Role.MLP_DOWN: "q5_1"})
    found = rf"target {target}, role mlp_down, weight blocks.0.mlp_down.*q5_1.*Leave {target} out.*int4_g32"
    with pytest.raises(UsageError, match=found):
        exporter.check(model, exporter.options())
    plain = replace(model, graph=assign_schemes(model.graph, SCHEMES["int8_g32"], {}))
    exporter.check(plain, exporter.options())


@pytest.mark.parametrize("target", [Target.GGUF, Target.MLX])
def test_a_family_that_the_runtime_has_no_name_for_is_refused(target: Target, tmp_path: Path) -> None:
    model = make_model("llama3", tmp_path)
    odd = replace(model, graph=replace(model.graph, config=replace(model.graph.config, family="odd")))
    found = (
        rf"no model of this family \(target {target}\); expected phi3, llama, mistral; found odd. Leave {target} out"
    )
    with pytest.raises(UsageError, match=found):
        EXPORTERS[target].check(odd, EXPORTERS[target].options())


def test_a_mix_is_named() -> None:
    from exporters.schemes import refuse_ggml_schemes
    from tests.exporters.tiny_graphs import BASE, model_of, random_graph

    model = model_of(assign_schemes(random_graph(BASE), MIXES["q4_k_m"], {}), mix="q4_k_m")
    with pytest.raises(UsageError, match=r"role embedding.*q5_0 \(of the mix q4_k_m\)"):
        refuse_ggml_schemes(model, Target.MLX)
    refuse_ggml_schemes(model_of(random_graph(BASE)), Target.MLX)
