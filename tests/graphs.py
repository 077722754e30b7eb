"""Chains of Gaussians and small graphs by hand, and what a request to them runs or is refused for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from chaindiff.chain.graph import Plan, resolve
from chaindiff.chain.producers import Producer
from chaindiff.io.errors import UserError

EXACT = 1e-8
DIFFERENT = 1e-5  # far above rounding: a refused request must be off by more than this


def stage(outputs: str, inputs: str = "", *conditionals: str) -> Producer:
    given = frozenset(frozenset(c.split()) for c in conditionals)
    return Producer(outputs.replace(" ", "_"), "stage", tuple(outputs.split()), tuple(inputs.split()), given)


def source(output: str) -> Producer:
    return Producer(output, "source", tuple(output.split()))


def encoder(output: str, of: str) -> Producer:
    return Producer(f"{output}_of_{of}", "encoder", (output,), (of,))


def decoder(output: str, of: str) -> Producer:
    return Producer(output, "decoder", (output,), (of,))


# ------------------------------------------------------------ Gaussian worlds


class World:
    """A linear Gaussian model: every variable is a matrix times one standard normal vector.

    `keeps[x]` names inputs of x's stage that x contains unharmed (mixed with the rest by an invertible matrix), so that
    an encoder from x to them exists; on a decoder's output, that the decoder is invertible.
    """

    def __init__(self, producers: Sequence[Producer], keeps: dict[str, str] | None = None, seed: int = 0):
        self.producers = tuple(producers)
        rng = np.random.default_rng(seed)
        keeps = keeps or {}
        generated = {o for p in producers if p.kind != "encoder" for o in p.outputs}
        columns = 40
        fresh = 0
        self.map: dict[str, np.ndarray] = {}
        todo = list(producers)
        while todo:
            producer = next(
                p
                for p in todo
                if all(i in self.map for i in p.inputs) and (p.kind != "encoder" or p.outputs[0] not in self.map)
            )
            todo.remove(producer)
            todo = [p for p in todo if p.kind != "encoder" or p.outputs[0] not in generated | set(self.map)]
            width = 2 * len(producer.outputs)
            for output in producer.outputs:
                inputs = [self.map[i] for i in producer.inputs]
                if not producer.random:
                    if producer.kind == "decoder" or output not in generated:
                        size = len(inputs[0]) if output in keeps else 1
                        self.map[output] = rng.normal(size=(size, len(inputs[0]))) @ inputs[0]
                    continue
                noise = np.zeros((1, columns))
                noise[:, fresh : fresh + width] = rng.normal(size=(1, width))
                for value in inputs:
                    noise = noise + rng.normal(size=(1, len(value))) @ value
                parts = np.concatenate([self.map[k] for k in keeps.get(output, "").split()] + [noise])
                rotation = np.linalg.qr(rng.normal(size=(len(parts), len(parts))))[0]
                self.map[output] = rotation @ parts
            fresh += width if producer.random else 0
        assert fresh <= columns

    @property
    def names(self) -> list[str]:
        return list(self.map)

    def rows(self, names: Iterable[str]) -> np.ndarray:
        return np.concatenate([np.zeros((0, 40)), *(self.map[name] for name in names)])

    def conditional(self, outputs: Iterable[str], inputs: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Regression matrix and covariance of p(outputs | inputs)."""
        a, b = self.rows(outputs), self.rows(inputs)
        gain = a @ b.T @ np.linalg.pinv(b @ b.T, rcond=1e-11, hermitian=True)
        rest = a - gain @ b
        return gain, rest @ rest.T

    def encode(self, producer: Producer) -> np.ndarray:
        (output,), (of,) = producer.outputs, producer.inputs
        matrix = self.map[output] @ np.linalg.pinv(self.map[of], rcond=1e-11)
        np.testing.assert_allclose(matrix @ self.map[of], self.map[output], atol=1e-9)
        return matrix

    def error(self, want: Sequence[str], given: Sequence[str], steps: Iterable[tuple]) -> float:
        """Largest deviation of mean and covariance, after `steps` (producer, inputs, outputs), from p(want | given)."""
        total = len(self.rows(given))
        offsets = np.cumsum([0, *(len(self.map[name]) for name in given)])
        eye = np.eye(total)
        mean = {name: eye[offsets[i] : offsets[i + 1]] for i, name in enumerate(given)}  # as a matrix on what is given
        noise = {name: np.zeros((len(mean[name]), 0)) for name in given}  # as a matrix on independent normals

        def stack(parts: dict[str, np.ndarray], names: Iterable[str], width: int) -> np.ndarray:
            padded = [np.pad(parts[n], ((0, 0), (0, width - parts[n].shape[1]))) for n in names]
            return np.concatenate([np.zeros((0, width)), *padded])

        width = 0
        for producer, inputs, outputs in steps:
            if not producer.random:
                gain, covariance = self.encode(producer), None
            else:
                gain, covariance = self.conditional(outputs, inputs)
            new_mean, new_noise = gain @ stack(mean, inputs, total), gain @ stack(noise, inputs, width)
            if covariance is not None:
                values, vectors = np.linalg.eigh(covariance)
                new_noise = np.concatenate([new_noise, vectors * np.sqrt(values.clip(0))], axis=1)
                width = new_noise.shape[1]
            start = 0
            for output in outputs:
                rows = slice(start, start + len(self.map[output]))
                mean[output], noise[output], start = new_mean[rows], new_noise[rows], rows.stop
        got_mean, got_noise = stack(mean, want, total), stack(noise, want, width)
        a, b = self.rows(want), self.rows(given)
        _, covariance = self.conditional(want, given)
        off_mean = np.abs(got_mean @ b - a @ b.T @ np.linalg.pinv(b @ b.T, rcond=1e-11, hermitian=True) @ b)
        return float(max(off_mean.max(initial=0), np.abs(got_noise @ got_noise.T - covariance).max()))

    def heedless(self, want: Iterable[str], given: Sequence[str]) -> list[tuple]:
        """Ancestral sampling without regard to evidence, written apart from the resolver."""
        steps: list[tuple] = []
        have = set(given)
        encoders = [p for p in self.producers if p.kind == "encoder"]
        for _ in self.map:
            for p in self.producers:
                if p.random:
                    continue
                if p.inputs[0] in have and p.outputs[0] not in have:
                    have.add(p.outputs[0])
                    steps.append((p, p.inputs, p.outputs))

        def visit(name: str) -> None:
            if name in have:
                return
            makers = [p for p in self.producers if name in p.outputs and p.kind != "encoder"]
            maker = (makers or [p for p in encoders if name in p.outputs])[0]
            for i in maker.inputs:
                visit(i)
            outputs = tuple(o for o in maker.outputs if o not in have)
            fixed = tuple(o for o in maker.outputs if o in have)
            trained = frozenset(fixed) in maker.conditionals
            steps.append((maker, (*maker.inputs, *fixed) if trained else maker.inputs, outputs))
            have.update(outputs)

        for name in want:
            visit(name)
        return steps


def random_world(seed: int, decodes: bool = False) -> World:
    """Up to five variables: stages, joint stages, sources, encoders beside stages and in their place, or decoders."""
    rng = np.random.default_rng([7, seed])
    function = decoder if decodes else encoder
    names = list("abcde"[: rng.integers(3, 6)])
    producers: list[Producer] = []
    keeps: dict[str, str] = {}
    earlier: list[str] = []
    while names:
        joint = len(names) > 1 and rng.random() < 0.2
        outputs = [names.pop(0) for _ in range(2 if joint else 1)]
        inputs = [name for name in earlier if rng.random() < 0.5]
        if inputs and not joint and rng.random() < (0.5 if decodes else 0.25):
            made = function(outputs[0], inputs[0])
            producers.append(made)
            if rng.random() < 0.3 or (decodes and rng.random() < 0.5):  # an invertible one
                keeps[outputs[0]] = inputs[0]
                if not any(inputs[0] == p.outputs[0] and p.kind == "encoder" for p in producers):
                    producers.append(encoder(inputs[0], outputs[0]))
                siblings = [p.outputs[0] for p in producers if p.kind == "decoder" and p.inputs == made.inputs]
                producers += [encoder(s, outputs[0]) for s in siblings if s != outputs[0] and rng.random() < 0.7]
        else:
            conditionals = [o for o in outputs if joint and rng.random() < 0.5]
            made = stage(" ".join(outputs), " ".join(inputs), *conditionals)
            producers.append(made if inputs or joint else source(outputs[0]))
            for i, output in enumerate(outputs):
                kept = [name for name in inputs + outputs[:i] if rng.random() < 0.4]
                keeps[output] = " ".join(kept)
                producers += [encoder(k, output) for k in kept if not encodes_only(producers, k)]
        earlier += outputs
    return World(producers, keeps, seed)


def encodes_only(producers: Iterable[Producer], name: str) -> bool:
    return not any(name in p.outputs for p in producers if p.kind != "encoder")


CASCADE = World(
    [
        stage("clip"),
        stage("image16", "clip"),
        stage("image", "image16"),
        encoder("image16", "image"),
        encoder("clip", "image16"),
        encoder("clip", "image"),
    ],
    {"image16": "clip", "image": "image16"},
)
WORLDS = {
    "chain": World([source("a"), stage("b", "a"), stage("c", "b"), stage("d", "c")]),
    "fork": World([source("a"), stage("b", "a"), stage("c", "a"), stage("d", "c")]),
    "collider": World([source("a"), source("b"), stage("c", "a b"), stage("d", "c")]),
    "diamond": World([stage("a"), stage("b", "a"), stage("c", "a"), stage("d", "b c")]),
    "complete": World([stage("a"), stage("b", "a"), stage("c", "a b"), stage("d", "a b c")]),
    "vcdm": World([source("label"), stage("clip", "label"), stage("image", "clip"), encoder("clip", "image")],
                  {"image": "clip"}),
    "cascade": CASCADE,
    "cascade without image16 -> clip": World(
        [p for p in CASCADE.producers if p.name != "clip_of_image16"], {"image16": "clip", "image": "image16"}
    ),
    "fork of encoders": World(
        [stage("clip"), stage("small", "clip"), stage("image", "small clip"), encoder("small", "image"),
         encoder("clip", "image"), encoder("feature", "small")],
        {"image": "small clip"},
    ),
    "latent": World(
        [source("label"), stage("latent", "label"), encoder("image", "latent"), encoder("latent", "image"),
         encoder("clip", "image")],
        {"image": "latent"},
    ),
    "joint": World(
        [source("g"), stage("image text", "g", "text"), encoder("embedding", "text"), stage("big", "image")],
    ),
    "joint with an encoding": World(
        [source("g"), stage("clip image", "g", "clip"), encoder("clip", "image"), stage("big", "image"),
         encoder("clip", "big")],
        {"image": "clip", "big": "image"},
    ),
    "joint, both ways": World([stage("image text", "", "text", "image"), stage("a", "image"), stage("b", "text")]),
    "decoded": World(
        [source("label"), stage("latent", "label"), decoder("image", "latent"), encoder("latent", "image"),
         encoder("clip", "image")],
        {"image": "latent"},
    ),
    "decoded, clip first": World(
        [stage("clip"), stage("latent", "clip"), decoder("image", "latent"), encoder("latent", "image"),
         encoder("clip", "image")],
        {"latent": "clip", "image": "latent"},
    ),
    "decoded, clip first, seen by the image alone": World(
        [stage("clip"), stage("latent", "clip"), decoder("image", "latent"), encoder("clip", "image"),
         stage("text", "clip")],
        {"latent": "clip", "image": "latent"},
    ),
    "decoded twice": World(
        [stage("clip"), stage("latent", "clip"), decoder("image", "latent"), decoder("preview", "latent"),
         encoder("preview", "image"), encoder("latent", "image")],
        {"image": "latent"},
    ),
    "decoded, then enlarged": World(
        [source("label"), stage("latent", "label"), decoder("image", "latent"), stage("big", "image"),
         encoder("image", "big"), encoder("latent", "image")],
        {"image": "latent", "big": "image"},
    ),
    "decoded without an encoder": World(
        [source("label"), stage("latent", "label"), decoder("image", "latent"), stage("big", "image latent"),
         encoder("image", "big")],
        {"big": "image"},
    ),
    "decoded from a joint stage": World(
        [source("g"), stage("clip latent", "g", "clip"), decoder("image", "latent"), encoder("clip", "image"),
         encoder("latent", "image")],
        {"latent": "clip", "image": "latent"},
    ),
    "decoded again": World(
        [stage("code"), decoder("latent", "code"), decoder("image", "latent"), encoder("latent", "image"),
         encoder("clip", "image"), stage("text", "clip")],
        {"image": "latent"}, seed=1,
    ),
} | {f"random {seed}": random_world(seed) for seed in range(16)} | {
    f"random with decoders {seed}": random_world(seed, decodes=True) for seed in range(24)
}  # fmt: skip


def requests(names: Sequence[str]) -> Iterable[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every (want, given) with something wanted that is not given."""
    for roles in itertools.product((0, 1, 2), repeat=len(names)):
        want = tuple(n for n, r in zip(names, roles, strict=True) if r == 1)
        if want:
            yield want, tuple(n for n, r in zip(names, roles, strict=True) if r == 2)


def check_executable(plan: Plan) -> None:
    """Runs a plan on a dictionary: what is read is there, nothing is made twice, and only what is wanted remains."""
    have = set(plan.given)
    for step in plan.steps:
        assert have.issuperset(step.inputs)
        assert set(step.inputs) >= set(step.producer.inputs)
        assert step.outputs and not have.intersection(step.outputs)
        have.update(step.outputs)
        assert have.issuperset(step.drop)
        have.difference_update(step.drop)
    assert have == set(plan.want) | set(plan.unused)


def names_of(plan: Plan) -> list[str]:
    return [step.producer.name for step in plan.steps]


def refusal(producers: Sequence[Producer], want: Sequence[str], given: Sequence[str] = ()) -> str:
    with pytest.raises(UserError) as caught:
        resolve(producers, want, given)
    return str(caught.value)
