"""The public verbs: compress, prune, quantize. Language models go to lighten.pipeline.

lighten.compress(model, example_inputs, budget="0.5 macs", data=loader, evaluate=fn)
lighten.prune(model, example_inputs, budget="0.5 macs", data=loader)
lighten.quantize(model, example_inputs, data=loader)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from lighten.errors import WrongUse
from lighten.loaders import check_other
from lighten.network import Network
from lighten.pipeline import compress as compress_language_model
from lighten.result import Result
from lighten.samples import Samples, samples

if TYPE_CHECKING:
    from lighten.prune import Pruned
    from lighten.quantized import Quantized

SAMPLES = {"windows": 64, "examples": 1024}


def compress(
    model: Any,
    example_inputs: Any = None,
    *,
    budget: str | None = None,
    max_kld: float | None = None,
    data: Any = None,
    test: Any = None,
    evaluate: Callable[[Any], float] | None = None,
    export: str | None = None,
    quantize: str | None = None,
    sparsity: str | None = None,
    multiple: int | None = None,
    weights: str | Path | None = None,
    size: int | None = None,
    mean: Any = None,
    std: Any = None,
    crop: Any = None,
    recover: str | None = None,
    learn_from: str | None = None,
    rate: float | None = None,
    augment: str | None = None,
    mirrored: bool | None = None,
    optimizer: str | None = None,
    patience: int | None = None,
    learn: str | None = None,
    learn_codes: bool | None = None,
    even_columns: bool | None = None,
    out: str | Path | None = None,
    also: str | None = None,
    samples: int | None = None,
    length: int = 512,
    seed: int = 0,
) -> Result:
    """Make `model` fit a budget, write it in the form that its runtime loads, and measure it.

    model: a torch.nn.Module with example_inputs; or `package.module:factory`, `file.py:factory`
    (with `weights`, and `size` of its images) or a .pt2 file; or a language model: a Hugging Face
    folder, a hub id or a .gguf file.

    budget: "80MB", "25%"; of networks also "0.5 macs", "2M params", "12ms", "50% ms"; of language
    models also "4.5bpw", or max_kld instead. data: what to calibrate on; of networks a DataLoader,
    an iterable of batches, tensors or a path of images (with mean and std), of language models a
    path of text. test: other data of that kind to measure on. evaluate: called with the network (a
    callable on batches), returns what counts, higher is better. export: "onnx" or "checkpoint" of
    networks, "gguf" and others of language models. quantize, sparsity: see
    lighten.compress_network. recover: "10epochs" or "500steps" of learning what was lost back from
    the model as it came; learn_from: the lesson, where none is given "logits:1", or "outputs:1"
    of networks whose outputs are no logits. rate, augment, mirrored, optimizer: of networks, see
    lighten.recover. patience: evaluations without a better one after which the recovery stops; one
    is made each epoch, and five at least. learn: of networks, "100steps" in which the scales of
    their integers learn from the model as it came (learn_codes: the codes too); with recover as
    many steps, but no more than 100, unless this says "none". even_columns: of language models,
    columns of weights are scaled before they are rounded (see lighten.even_columns).

    also: of networks, another exporter whose file is written too, and named by the result.

    The same call resumes. Raises UserError for what a person can mend.
    """
    asked = dict(locals())
    check_learning(
        recover, learn, rate=rate, learn_codes=learn_codes, learn_from=learn_from, augment=augment,
        mirrored=mirrored, optimizer=optimizer, patience=patience,
    )  # fmt: skip
    if not is_network(model):
        for name, value in {
            "example_inputs": example_inputs, "evaluate": evaluate, "quantize": quantize,
            "rate": rate, "augment": augment, "mirrored": mirrored, "optimizer": optimizer,
            "weights": weights, "size": size, "mean": mean, "std": std, "test": test,
            "multiple": multiple, "crop": crop, "sparsity": sparsity, "also": also,
            "learn": learn, "learn_codes": learn_codes,
        }.items():  # fmt: skip
            if value is not None:
                raise WrongUse(
                    f"{name} is for networks, and {model} is opened as a language model",
                    "a network is an nn.Module, package.module:factory or file.py:factory",
                )
        return compress_language_model(
            model, budget=budget, max_kld=max_kld, data=data, export=export or "gguf", out=out,
            samples=SAMPLES["windows"] if samples is None else samples, length=length, seed=seed,
            recover=recover, learn_from=learn_from, patience=patience,
            even_columns=bool(even_columns),
        )  # fmt: skip
    if max_kld is not None:
        raise WrongUse("max_kld is for language models", "give a budget")
    if even_columns is not None:
        raise WrongUse("even_columns is for language models", "leave it out")
    from lighten.compress_network import compress_network
    from lighten.network_runs import storable

    need_data(data)
    check_other(data, test)
    network, recovery, scales = opened(model, example_inputs, weights, size), None, None
    if recover is not None or learn is not None:
        from lighten.recover_stage import Recovery
        from lighten.scales_stage import Scales
        from lighten.training_data import collected
        from lighten.usual_lesson import usual_lesson

        # once, for what is measured on must not be learned from
        data = collected(loaded(data, network, size=size, mean=mean, std=std, crop=crop))
        count, tested = SAMPLES["examples"] if samples is None else samples, test is not None
        if recover is not None:
            recovery = Recovery.of(
                data, recover, learn_from or usual_lesson(network), rate, augment,
                calibration=count, tested=tested, seed=seed, mirrored=mirrored, optimizer=optimizer,
                patience=patience,
            )  # fmt: skip
            recovery.check(network)
        scales = Scales.of(
            network, data, learn, bool(learn_codes), recovery, learn_from, augment,
            calibration=count, tested=tested, seed=seed,
        )  # fmt: skip
    network, found = opened_with_data(
        network, None, data, test=test, size=size, mean=mean, std=std, crop=crop, count=samples,
        seed=seed,
    )  # fmt: skip
    return compress_network(
        network, found, budget=budget, export=export or "onnx", quantize=quantize or "auto",
        sparsity=sparsity, recovery=recovery, scales=scales, evaluate=evaluate,
        multiple=multiple, out=out, also=also, asked=storable(asked),
    )  # fmt: skip


def check_learning(
    recover: str | None, learn: str | None, *, rate: float | None, learn_codes: bool | None,
    learn_from: str | None, augment: str | None, mirrored: bool | None,
    optimizer: str | None, patience: int | None,
) -> None:  # fmt: skip
    """Raises WrongUse where something says how to learn and nothing that it is to be done."""
    learns = None if learn == "none" else learn
    for name, given, able in (
        ("rate", rate, recover), ("learn_codes", learn_codes, learns or recover),
        ("learn_from", learn_from, learns or recover), ("augment", augment, learns or recover),
        ("mirrored", mirrored, recover), ("optimizer", optimizer, recover),
        ("patience", patience, recover),
    ):  # fmt: skip
        if given is not None and able is None:
            raise WrongUse(
                f"{name} says how to recover",
                'add recover, such as "10epochs"'
                + (
                    ""
                    if name in ("rate", "mirrored", "optimizer", "patience")
                    else ', or for integers learn, such as "100steps"'
                ),
            )


def is_network(model: Any) -> bool:
    """Whether a model is a network: a module, a factory's name or an exported program."""
    if isinstance(model, nn.Module | Network):
        return True
    text = str(model)
    if text.endswith(".pt2"):
        return True
    home, colon, name = text.partition(":")
    # a Windows path has a colon too, and a folder is never a factory
    return bool(colon) and len(home) > 1 and bool(name) and not Path(text).exists()


def opened_with_data(
    model: Any, example_inputs: Any, data: Any, *, test: Any = None,
    weights: str | Path | None = None, size: int | None = None, mean: Any = None,
    std: Any = None, crop: Any = None, count: int | None = None, seed: int = 0,
) -> tuple[Network, Samples]:  # fmt: skip
    """The network and what it is calibrated and measured on; raises UserError."""
    need_data(data)
    network = opened(model, example_inputs, weights, size)
    parts = [
        loaded(part, network, size=size, mean=mean, std=std, crop=crop) for part in (data, test)
    ]
    found = samples(
        parts[0], test=parts[1],
        calibration=SAMPLES["examples"] if count is None else count, seed=seed,
        source=str(data) if isinstance(data, str | Path) else "",
    )  # fmt: skip
    shape = tuple(network.inputs[0].shape[1:])
    if tuple(found.calibration.shape[1:]) != shape:
        raise WrongUse(
            f"the data is {tuple(found.calibration.shape[1:])} and the network takes {shape}",
            "give --size, or example inputs of the data's shape",
        )
    return network, found


def need_data(data: Any) -> None:
    """Raises WrongUse where a network was given no data."""
    if data is None:
        raise WrongUse(
            "a network needs data to calibrate on",
            "--data images.parquet (or a folder, a zip, an .npz); in Python data=loader",
        )


def opened(
    model: Any, example_inputs: Any = None, weights: str | Path | None = None,
    size: int | None = None,
) -> Network:  # fmt: skip
    """A Network of a module with example inputs, or of a factory's name; raises UserError."""
    if isinstance(model, Network):
        return model
    if not isinstance(model, nn.Module | str | Path):
        _refuse(model)
    if not isinstance(model, nn.Module):
        from lighten.factories import open_network

        return open_network(str(model), weights, inputs=example_inputs, size=size)
    if example_inputs is None:
        if size is None:
            raise WrongUse(
                "a module needs example inputs", "for images: torch.zeros(1, 3, 224, 224)"
            )
        from lighten.factories import example_images

        example_inputs = example_images(size)
    return Network.of(model, example_inputs)


def _refuse(model: Any) -> NoReturn:
    """Raises WrongUse for what no network can be opened from."""
    from lighten.quantized import Quantized

    hint = "an nn.Module with its example inputs, or package.module:factory"
    if isinstance(model, Quantized):
        hint = 'its integers learn by lighten.recover, or lighten.quantize(..., learn="100steps")'
    elif isinstance(getattr(model, "network", None), Network):
        hint = "pass its `network`"
    raise WrongUse(f"a {type(model).__name__} is no float network", hint)


def loaded(data: Any, network: Network, *, size: int | None, mean: Any, std: Any, crop: Any) -> Any:
    """Data as it is, or the images at a path, as the network takes them."""
    shape = tuple(network.inputs[0].shape[1:])
    return read(data, shape, size=size, mean=mean, std=std, crop=crop)


def read(
    data: Any, shape: tuple[int | None, ...], *, size: int | None, mean: Any, std: Any, crop: Any
) -> Any:
    """Data as it is, or the images at a path, for examples of such a shape."""
    if not isinstance(data, str | Path):
        return data
    from lighten.images import load_images

    side = size if size is not None else shape[-1] if shape else None
    return load_images(data, size=side, mean=mean, std=std, channels=shape[0] if shape else None,
                       crop=crop or "center")  # fmt: skip


def prune(
    model: Any,
    example_inputs: Any = None,
    *,
    budget: str,
    data: Any = None,
    criterion: str = "group_obs",
    per_axis: bool = False,
    steps: int = 1,
    multiple: int = 1,
    compensate: bool = True,
    batch_norms: bool = True,
    count: int = SAMPLES["examples"],
) -> Pruned:
    """Remove channels and heads until `budget` ("0.5 macs", "2M params") is met.

    data: as for compress, `count` examples of it are used. For all else see
    lighten.prune.prune_network. The model itself is not changed: the result has a `module`.
    """
    from lighten.prune import prune_network

    network = opened(model, example_inputs)
    return prune_network(
        network, None if data is None else calibration(data, network, count), budget=budget,
        criterion=criterion, per_axis=per_axis, steps=steps, multiple=multiple,
        compensate=compensate, batch_norms=batch_norms,
    )  # fmt: skip


def quantize(
    model: Any,
    example_inputs: Any = None,
    *,
    data: Any,
    weights: int | str = 8,
    activations: int | None = 8,
    group: int | None = None,
    bar: float | None = None,
    spare: int | None = None,
    reduce_range: bool | None = None,
    solver: str = "gptq",
    learn: str | None = None,
    learn_codes: bool = False,
    count: int = 256,
) -> Quantized:
    """Static integers: weights per channel, activations per tensor, ranges from `data`.

    activations=None leaves them float; then group=32 (or 64, 128) gives linear weights a scale for
    so many inputs, which ONNX has as MatMulNBits; weights="int4_g32" says the same at once.

    bar: least signal-to-noise ratio of the output in dB; what costs most stays float (or, with
    spare=16, gets 16 bits first) until it is met. reduce_range: weights of 7 bits, for processors
    whose products of 8 bits saturate; None: as this one needs it. solver: "gptq", "learned", "rtn".
    learn: "100steps" in which steps of weights and activations learn from the float network (with
    learn_codes the codes too), see lighten.learn_quantized; a quarter of the data is held out.
    `write_onnx` exports the result; lighten.simulate.Simulation(result) computes what the runtime
    will.
    """
    from lighten.precision import named
    from lighten.quantize_network import quantize as quantize_network

    if isinstance(weights, str):
        weights, activations, group = named(weights)
    if learn is None and learn_codes:
        raise WrongUse("learn_codes says what to learn", 'add learn, such as "100steps"')
    network = opened(model, example_inputs)
    seen = calibration(data, network, count)

    def make(x: Tensor) -> Quantized:
        return quantize_network(
            network, x, bits_weights=weights, bits_activations=activations, group=group, bar=bar,
            spare=spare, reduce_range=reduce_range, solver=solver,
        )  # fmt: skip

    if learn is None:
        return make(seen)
    from lighten.learn_quantized import quantize_and_learn

    return quantize_and_learn(network, seen, make, length=learn, codes=learn_codes).quantized


def write_onnx(made: Any, path: str | Path, example_inputs: Any = None) -> Path:
    """Write what prune or quantize made, or a module, as ONNX; opened and compared in onnxruntime
    where that is installed. Raises BadOutput where it computes something else."""
    from lighten.network_results import verify
    from lighten.prune import Pruned
    from lighten.quantized import Quantized
    from lighten.registry import exporters

    if isinstance(made, Pruned):
        made = made.network
    elif not isinstance(made, Quantized):
        made = opened(made, example_inputs)
    exporters["onnx"].write(made, Path(path))
    network = made.network if isinstance(made, Quantized) else made
    if len(network.inputs) == 1:
        verify(Path(path), made, network.inputs[0])
    return Path(path)


def load(factory: Callable[[], nn.Module], folder: str | Path) -> nn.Module:
    """The smaller module that `Pruned.save`, or compress as a checkpoint, wrote; factory makes the
    whole one."""
    from lighten import open_checkpoint, saved

    if open_checkpoint.is_checkpoint(Path(folder)):
        return open_checkpoint.load(factory, Path(folder))
    return saved.load(factory, Path(folder))


def calibration(data: Any, network: Network, count: int) -> Tensor:
    """Up to `count` examples of any kind of data, as the network takes them."""
    found = loaded(data, network, size=None, mean=None, std=None, crop=None)
    return samples(found, calibration=count, test=found).calibration
