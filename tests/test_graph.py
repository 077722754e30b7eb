"""The resolver. Truth: joint Gaussians whose stages, sources, encoders and decoders are exact, in closed form."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Sequence

import networkx as nx
import numpy as np
import pytest
from graphs import (
    CASCADE,
    check_executable,
    decoder,
    encoder,
    names_of,
    refusal,
    source,
    stage,
)

from chaindiff.chain.arrows import ancestors, depth_first, shortest_path
from chaindiff.chain.graph import resolve
from chaindiff.chain.producers import Producer
from chaindiff.io.errors import UserError

# ------------------------------------------------------------ plans, by hand


def test_from_nothing_every_stage_runs_once_and_no_encoder() -> None:
    plan = resolve(CASCADE.producers, ["image", "clip"], [])
    assert names_of(plan) == ["clip", "image16", "image"]
    assert [step.drop for step in plan.steps] == [(), (), ("image16",)]


def test_a_given_variables_stage_does_not_run() -> None:
    assert names_of(resolve(CASCADE.producers, ["image"], ["clip"])) == ["image16", "image"]
    assert names_of(resolve(CASCADE.producers, ["image"], ["image16"])) == ["image"]
    assert names_of(resolve(CASCADE.producers, ["image"], ["image"])) == []


def test_given_the_image_the_rest_is_encoded() -> None:
    plan = resolve(CASCADE.producers, ["clip", "image16"], ["image"])
    assert [step.producer.kind for step in plan.steps] == ["encoder", "encoder"]


def test_what_is_sampled_is_not_encoded_again() -> None:
    producers = [encoder("clip", "image"), stage("image", "image16"), stage("image16", "clip"), stage("clip")]
    assert names_of(resolve(producers, ["clip", "image"])) == ["clip", "image16", "image"]
    assert "stage 'clip' would sample 'clip' without regard to 'image16'" in refusal(producers, ["clip"], ["image16"])


def test_evidence_that_changes_nothing_is_told() -> None:
    plan = resolve(CASCADE.producers, ["image"], ["clip", "image16"])
    assert names_of(plan) == ["image"] and plan.unused == ("clip",)


def test_order_is_topological_then_that_of_declaration() -> None:
    producers = [stage("z", "x y"), source("y"), source("x"), stage("w", "y")]
    assert names_of(resolve(producers, ["w", "z"])) == ["y", "x", "z", "w"]
    plan = resolve(producers, ["z", "w"])
    assert [step.drop for step in plan.steps] == [(), (), ("x",), ("y",)]


def test_unwanted_outputs_of_a_joint_stage_are_dropped_at_once() -> None:
    (step,) = resolve([stage("image text")], ["image"]).steps
    assert step.outputs == ("image", "text") and step.drop == ("text",)


def test_a_joint_stage_given_one_output_reads_it_and_makes_the_other() -> None:
    (step,) = resolve([stage("image text", "", "text")], ["image"], ["text"]).steps
    assert step.inputs == ("text",) and step.outputs == ("image",)


# ------------------------------------------------------------ refusals, by their text


def test_unknown_names() -> None:
    assert "want: no variable 'imag' in this chain; did you mean 'image'?" in refusal(CASCADE.producers, ["imag"])
    assert "given: no variable 'clop' in this chain; did you mean 'clip'?" in refusal(
        CASCADE.producers, ["image"], ["clop"]
    )
    assert "nothing is wanted\n  want one or more of: clip, image16, image" in refusal(CASCADE.producers, [])


def test_cycle_among_stages() -> None:
    text = refusal([stage("clip", "image"), stage("image", "clip")], ["image"])
    assert "stages form a cycle: clip -> image -> clip" in text or "image -> clip -> image" in text
    assert "remove an input from one of: stage" in text


def test_one_variable_of_two_stages() -> None:
    text = refusal([stage("clip"), source("clip")], ["clip"])
    assert "'clip' is generated twice: by stage 'clip' and by source 'clip'" in text


def test_nothing_can_produce_it() -> None:
    producers = [stage("clip", "caption"), stage("image", "clip"), encoder("clip", "image")]
    text = refusal(producers, ["image"])
    assert text == (
        "nothing can produce 'image': stage 'image' needs 'clip'; stage 'clip' needs 'caption'; "
        "encoder 'clip_of_image' needs 'image' to be given; no stage, encoder or source produces 'caption'\n"
        "  give 'caption', or name a source (empirical or uniform) for what is drawn when sampling"
    )
    assert resolve(producers, ["image"], ["caption"]).steps
    text = refusal([encoder("latent", "image"), encoder("image", "latent")], ["image"])
    assert "encoder 'image_of_latent' needs 'latent'; encoder 'latent_of_image' needs 'image'" in text
    assert "give one of 'image' or 'latent'" in text


def test_ignored_evidence_is_named_with_ways_out() -> None:
    producers = [source("group"), stage("clip", "group"), stage("image16", "clip")]
    assert refusal(producers, ["group"], ["clip"]) == (
        "source 'group' would sample 'group' without regard to 'clip', which is given and depends on it "
        "(group -> clip)\n"
        "  declare an encoder that computes 'group' from 'clip'; or do not give 'clip'"
    )
    producers = [stage("clip"), stage("image16", "clip"), stage("image", "image16 clip"), encoder("clip", "image")]
    text = refusal(producers, ["image"], ["image16"])
    assert "stage 'clip' would sample 'clip' without regard to 'image16', which is given" in text
    assert "give 'clip' as well; or declare an encoder that computes 'clip' from 'image16'; or do not give" in text
    assert "give 'image' as well" in refusal(producers, ["clip"], ["image16"])


def test_evidence_that_an_encoder_computes() -> None:
    producers = [source("group"), stage("clip", "group"), encoder("clip", "photo"), stage("image", "clip group")]
    text = refusal(producers, ["image"], ["photo"])
    assert "without regard to 'clip', which an encoder computes from what is given and depends on it" in text
    assert "give 'group' as well; or declare an encoder that computes 'group' from 'photo'" not in text
    assert "give 'group' as well" in text


def test_joint_stage_not_trained_for_a_conditional() -> None:
    text = refusal([stage("image text", "", "text")], ["text"], ["image"])
    assert "generates 'image' and 'text' together and was not trained to generate 'text' given 'image'" in text


def test_an_encoder_shows_that_stages_leave_a_dependence_out() -> None:
    producers = [stage("clip"), stage("image"), encoder("clip", "image")]
    assert "'image' and 'clip' would be sampled separately, though encoder 'clip_of_image' computes" in refusal(
        producers, ["image", "clip"]
    )
    assert "add 'clip' to what the stage of 'image' is given" in refusal(producers, ["image", "clip"])
    assert "stage 'image' would sample 'image' without regard to 'clip', which is given" in refusal(
        producers, ["image"], ["clip"]
    )
    assert names_of(resolve(producers, ["image"])) == ["image"]
    assert names_of(resolve(producers, ["clip"], ["image"])) == ["clip_of_image"]


# ------------------------------------------------------------ decoders, by hand

LATENT = (source("label"), stage("latent", "label"), decoder("image", "latent"), encoder("latent", "image"))


def test_what_is_sampled_is_decoded() -> None:
    plan = resolve(LATENT, ["image"])
    assert [str(step.producer) for step in plan.steps] == ["source 'label'", "stage 'latent'", "decoder 'image'"]
    assert plan.steps[-1].drop == ("latent",)


def test_a_given_image_is_encoded_and_not_decoded_again() -> None:
    assert names_of(resolve(LATENT, ["latent", "image"], ["image"])) == ["latent_of_image"]
    assert names_of(resolve(LATENT, ["image"], ["latent"])) == ["image"]


def test_what_is_given_is_decoded_and_that_encoded() -> None:
    producers = [stage("clip"), stage("latent", "clip"), decoder("image", "latent"), encoder("clip", "image")]
    assert names_of(resolve(producers, ["clip"], ["latent"])) == ["image", "clip_of_image"]
    assert names_of(resolve(producers, ["clip", "image"])) == ["clip", "latent", "image"]


def test_an_encoding_of_the_decoded_image_is_evidence_of_the_latent() -> None:
    producers = (*LATENT, encoder("clip", "image"))
    text = refusal(producers, ["image"], ["clip"])
    assert "source 'label' would sample 'label' without regard to 'clip', which is given" in text
    assert "(label -> latent -> image -> clip)\n  give 'latent' as well; or do not give 'clip'" in text
    text = refusal(producers, ["label"], ["image"])
    assert "source 'label' would sample 'label' without regard to 'image'" in text


def test_what_encodes_is_nearer_to_the_truth_than_what_decodes() -> None:
    producers = [
        decoder("image", "latent"), stage("latent"), encoder("latent", "photo"), encoder("small", "photo"),
        encoder("image", "small"),
    ]  # fmt: skip
    assert names_of(resolve(producers, ["image", "latent"], ["photo"])) == [
        "latent_of_photo", "small_of_photo", "image_of_small",
    ]  # fmt: skip


def test_cycles_through_decoders() -> None:
    text = refusal([stage("latent", "image"), decoder("image", "latent")], ["image"])
    assert "stages and decoders form a cycle: " in text and "latent -> image" in text
    assert "remove an input from one of: " in text and "stage 'latent'" in text and "decoder 'image'" in text
    text = refusal([decoder("a", "b"), decoder("b", "a")], ["a"])
    assert text.startswith("decoders form a cycle: ")


def test_a_variable_with_a_decoder_has_no_stage_and_no_second_decoder() -> None:
    text = refusal([*LATENT, stage("image")], ["image"])
    assert "'image' is generated twice: by decoder 'image' and by stage 'image'" in text
    assert "give each variable one stage, one source or one decoder" in text
    text = refusal([*LATENT, stage("x"), decoder("image", "x")], ["image"])
    assert "'image' is generated twice: by decoder 'image' and by decoder 'image'" in text


def test_a_latent_and_an_encoding_of_its_image_are_not_sampled_apart() -> None:
    producers = [stage("latent"), stage("clip"), decoder("image", "latent"), encoder("clip", "image")]
    for want in (["image", "clip"], ["latent", "clip"]):
        text = refusal(producers, want)
        assert "'image' and 'clip' would be sampled separately, though encoder 'clip_of_image'" in text
        assert "add 'clip' to what the stage of 'latent' is given" in text
    twins = [stage("latent"), decoder("a", "latent"), decoder("b", "latent"), encoder("b", "a")]
    assert names_of(resolve(twins, ["a", "b"])) == ["latent", "a", "b"]


def test_nothing_to_decode() -> None:
    text = refusal([decoder("image", "latent")], ["image"])
    assert "nothing can produce 'image': decoder 'image' needs 'latent'; no stage" in text


def test_imports_no_torch() -> None:
    code = "import sys, chaindiff.chain.graph; print({'torch', 'networkx'} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


def test_a_stage_may_be_given_what_an_encoder_makes_of_its_output() -> None:
    """p(image | clip) alone: clip is given, or encoded from another image that is; nothing samples it."""
    producers = [
        Producer("image", "stage", ("image",), ("clip",)),
        Producer("clip", "encoder", ("clip",), ("image",)),
    ]
    assert [step.producer.name for step in resolve(producers, ["image"], ["clip"]).steps] == ["image"]
    assert [step.producer.name for step in resolve(producers, ["clip"], ["image"]).steps] == ["clip"]
    with pytest.raises(UserError, match="nothing can produce 'image': stage 'image' needs 'clip'"):
        resolve(producers, ["image"])


# ------------------------------------------------------------ what is suggested


def answers(producers: Sequence[Producer], want: Sequence[str], given: Sequence[str]) -> bool:
    try:
        return bool(resolve(producers, want, given))
    except UserError:
        return False


@pytest.mark.parametrize("seed", range(12))
def test_what_to_give_is_all_that_helps_and_nothing_else(seed: int) -> None:
    """The variables that a refusal suggests are those that, tried one by one, make the request answerable."""
    rng = np.random.default_rng([11, seed])
    producers, names = [source("v0")], [f"v{i}" for i in range(12)]
    for i, name in enumerate(names[1:], 1):
        inputs = " ".join(str(v) for v in dict.fromkeys(rng.choice(names[max(0, i - 3) : i], rng.integers(1, 3))))
        producers.append(decoder(name, inputs.split()[0]) if rng.random() < 0.2 else stage(name, inputs))
        if rng.random() < 0.5:
            producers.append(encoder(str(rng.choice(names[:i])), name))
    if seed % 3 == 0:  # nothing generates `e`, and two encoders could make it
        producers += [encoder("e", str(rng.choice(part))) for part in (names[:6], names[6:])] + [stage("f", "e")]
    everything, refused = list(dict.fromkeys(v for p in producers for v in (*p.outputs, *p.inputs))), 0
    for want, given in itertools.product(everything[-4:], names[:8]):
        try:
            resolve(producers, [want], [given])
        except UserError as error:
            if "without regard" not in error.message:
                continue
            refused += 1
            hint = (error.hint or "").partition(" as well")[0].partition(";")[0]
            told = set(re.findall(r"'(\w+)'", hint)) if hint.startswith("give ") else set()
            assert told == {v for v in everything if v not in (want, given) and answers(producers, [want], [given, v])}
    assert refused


# ------------------------------------------------------------ size

COUNT = 1000
LINE = [stage(f"v{i}", f"v{i - 1}" if i else "") for i in range(COUNT)]
FAN = [stage(f"v{i}", " ".join(f"v{j}" for j in range(max(0, i - 5), i))) for i in range(COUNT)]
OWN = [p for i in range(COUNT) for p in (
    *(source(f"s{i}_{k}") for k in range(5)),
    stage(f"v{i}", " ".join([f"v{i - 1}"] * (i > 0) + [f"s{i}_{k}" for k in range(5)])),
)]  # fmt: skip
WIDE = [stage("root"), *(stage(f"v{i}", "root") for i in range(COUNT))]
BETWEEN = [p for i in range(COUNT) for p in (stage(f"v{i}", f"e{i - 1}" if i else ""), encoder(f"e{i}", f"v{i}"))]
DECODED = [p for i in range(COUNT) for p in (
    stage(f"l{i}", f"v{i - 1}" if i else ""), decoder(f"v{i}", f"l{i}"), encoder(f"l{i}", f"v{i}"),
)]  # fmt: skip
CASCADE_OF_MANY = LINE + [encoder(f"v{i}", f"v{i + 1}") for i in range(COUNT - 1)]
SHAPES = {
    "line": LINE, "line, backwards": LINE[::-1], "fan": FAN, "sources": OWN, "wide": WIDE, "encoders between": BETWEEN,
    "cascade": CASCADE_OF_MANY, "decoded": DECODED, "beside": [*LINE, stage("beside", "v0")],
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thousand_stages(shape: str) -> None:
    """Planned, or refused with every way out tried, within a second; the bound leaves room for slow machines."""
    for given in (*([], ["v500"], ["v999"]), *([["beside"]] if shape == "beside" else [])):
        began = time.process_time()
        try:
            plan = resolve(SHAPES[shape], ["v0" if given == ["v999"] else "v999"], given)
        except UserError as error:
            assert given and "without regard to" in error.message and error.hint
        else:
            check_executable(plan)
        assert time.process_time() - began < 3


# ------------------------------------------------------------ directed graphs


@pytest.mark.parametrize("seed", range(40))
def test_directed_graphs_as_networkx_has_them(seed: int) -> None:
    rng = np.random.default_rng([13, seed])
    names = [f"v{i}" for i in range(rng.integers(1, 12))]
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from(rng.choice(names, (rng.integers(0, 2 * len(names)), 2)).tolist())
    after = {name: dict.fromkeys(graph.successors(name)) for name in graph}
    found, bit = ancestors(after), {name: 1 << i for i, name in enumerate(after)}
    for a, b in itertools.product(names, repeat=2):
        assert bool(found[b] & bit[a]) == nx.has_path(graph, a, b)
        if nx.has_path(graph, a, b):
            path = shortest_path(after, a, [b])
            assert len(path) == nx.shortest_path_length(graph, a, b) + 1
            assert nx.is_path(graph, path) and (path[0], path[-1]) == (a, b)
    left, cycle = depth_first(after)
    assert sorted(left) == sorted(names) and bool(cycle) != nx.is_directed_acyclic_graph(graph)
    assert all(graph.has_edge(*edge) for edge in zip(cycle, [*cycle[1:], *cycle[:1]], strict=True))
    if not cycle:
        assert all(left.index(a) > left.index(b) for a, b in graph.edges)
