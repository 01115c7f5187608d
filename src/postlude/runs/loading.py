"""Load a checkpoint directory, after looking at it.

transformers loads what it can and says what went wrong in the words of its own internals, sometimes
only in a log line (a missing weight is drawn at random). So everything a directory can be refused
for is looked at first, in the order of cost: its files, its configuration, the headers of its
weights, and at last every weight once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from postlude.errors import CheckpointError, SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.importing import READERS, Foreign, Reader
from postlude.runs.pipeline import is_denoiser, load_denoiser
from postlude.runs.quiet import quiet_transformers
from postlude.runs.weights import check_depth, check_weights, read_header, read_json, weight_files
from postlude.surgery.anatomy import Anatomy, Kind, anatomy_of, kind_of
from postlude.surgery.layers import check_scales, quantized_linears
from postlude.zoo import MADE, checkpoint_path

__all__ = ["ZOO", "dtype_of", "load", "resolve"]

ZOO = "zoo:"
"""What begins the name of a model that comes with Postlude."""
# The name of Postlude's own format; its module imports transformers, so it is not asked for it here.
_METHOD = "postlude"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
)
_PROCESSOR_FILES = ("preprocessor_config.json",)
_AUDIO_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_AUDIO_CLASSES = (
    "AudioFlamingo3ForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
)
_DTYPES = ("float64", "float32", "float16", "bfloat16")


def load(
    path: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> Checkpoint:
    """Load a model from a Hugging Face directory; never from the network.

    What it is, its files say: a causal language model, an audio language model, a vision transformer (with or without
    a head that classifies), or a denoiser in the layout of diffusers, as a pipeline or alone. Float checkpoints, those
    that Postlude quantized and those in the layouts of GPTQ, AWQ and compressed-tensors load alike; the last become
    Postlude's own quantized layers, bit for bit. Reads the weights twice: once to see that they are finite, and
    those that were written, where their checksums (``SHA256SUMS``) lie beside them; once to build the model.

    Args:
        path: the directory, or ``zoo:NAME`` for a model that comes with Postlude.
        dtype: ``"auto"`` for the checkpoint's own, or float64, float32, float16, bfloat16.
        device: where to put the model; None for the accelerator if there is one, else the CPU.

    Raises:
        CheckpointError: not a checkpoint, a damaged one, or one in a refused format.
        NonFiniteError: a tensor holds NaN or infinity.
        ArchitectureError: no anatomy describes the model.
        SettingsError: an unknown dtype or device.
    """
    target_dtype = dtype_of(dtype)
    target_device = _device(device)
    directory = resolve(path)
    if is_denoiser(directory):
        model, scheduler, pipeline = load_denoiser(directory, target_dtype)
        checkpoint = _finished(model, directory, target_device)
        checkpoint.scheduler, checkpoint.pipeline = scheduler, pipeline
        return checkpoint
    config = _config(directory)
    kind = kind_of(config["model_type"])
    files = weight_files(directory)
    check_depth(directory / "config.json", config, files)
    check_weights(files)
    quantization = config.get("quantization_config") or {}
    reader = READERS.get(str(quantization.get("quant_method")))
    source = None if reader is None else _foreign(directory, quantization, reader)
    model = _model(directory, target_dtype, source, _class_finder(kind), config)
    checkpoint = _finished(model, directory, target_device, positive=reader is None)
    if kind == "language":
        checkpoint.tokenizer = _tokenizer(directory)
    elif kind == "audio":
        checkpoint.processor = _audio_processor(directory)
        checkpoint.tokenizer = getattr(checkpoint.processor, "tokenizer", None)
    else:
        checkpoint.processor = _processor(directory)
    return checkpoint


def _finished(
    model: Any, directory: Path, device: torch.device, *, positive: bool = True
) -> Checkpoint:
    """A checkpoint of a model that holds its weights, after a look at its layers."""
    check_scales(model, positive=positive)
    anatomy = anatomy_of(model)
    _check_places(model, anatomy, directory)
    model.eval()
    model.to(device)
    return Checkpoint(model=model, tokenizer=None, anatomy=anatomy, path=directory)


def resolve(path: str | os.PathLike[str]) -> Path:
    """The directory that a path or ``zoo:NAME`` stands for.

    Raises:
        CheckpointError: there is no such directory.
        UnknownNameError: the zoo has no model of that name.
    """
    name = os.fspath(path)
    if name.startswith(ZOO):
        return _zoo(name.removeprefix(ZOO))
    directory = Path(name)
    if directory.is_file():
        raise CheckpointError(
            f"{directory} is a file; expected a checkpoint directory with config.json and "
            f"safetensors weights. Give the directory: {directory.resolve().parent}"
        )
    if not directory.is_dir():
        raise CheckpointError(
            f"There is no directory {directory}; expected a checkpoint directory with config.json "
            "and safetensors weights. Postlude downloads nothing: fetch a model from the Hugging "
            "Face hub first (hf download NAME --local-dir DIRECTORY)."
        )
    return directory.resolve()


def _zoo(name: str) -> Path:
    if name in MADE:
        raise CheckpointError(
            f"zoo:{name} does not come with Postlude: make it ({MADE[name]}) and give its directory."
        )
    return checkpoint_path(name)


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{directory} holds an adapter, not a whole model: merge it into its base model "
                "first (merge_and_unload of the peft library) and save the result."
            )
        raise CheckpointError(
            f"{directory} is not a checkpoint: it has no config.json. Expected a Hugging Face "
            "model directory with config.json and safetensors weights, or one of diffusers with model_index.json."
        )
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f'{file} names no "model_type"; expected the configuration of a transformers model.'
        )
    quantization = config.get("quantization_config")
    if quantization is not None:
        scheme = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if scheme != _METHOD and scheme not in READERS:
            raise CheckpointError(
                f"{directory} is already quantized by {scheme!r}; expected float weights, a checkpoint that "
                f"Postlude quantized, or one in the layout of {', '.join(READERS)}. Start from the float model it "
                "was made from."
            )
    return config


def _check_places(model: Any, anatomy: Anatomy, directory: Path) -> None:
    known = {*anatomy.linears(), *anatomy.kept()}
    other = [path for path, _ in quantized_linears(model) if path not in known]
    if other:
        raise CheckpointError(
            f"{directory} quantizes {', '.join(other[:5])}; Postlude reads quantized linears of the blocks only. "
            "Start from the float model it was made from, or from a version with the head in floating point."
        )


def _foreign(directory: Path, quantization: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """What ``from_pretrained`` is given for a checkpoint in another library's layout."""
    transformers = importlib.import_module("transformers")
    huggingface = importlib.import_module("postlude.surgery.huggingface")
    found = Foreign({})
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as store:
            found.tensors.update({name: store.get_tensor(name) for name in store.keys()})  # noqa: SIM118
    reader(quantization, found)
    with quiet_transformers(), _refused(directory):
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    made_by = {"method": quantization["quant_method"], "settings": quantization, "imported": True}
    config.quantization_config = huggingface.PostludeConfig(
        description=huggingface.describe_linears(found.specs), made_by=made_by
    ).to_dict()
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": found.tensors}


def _class_finder(kind: Kind) -> Callable[[Path, dict[str, Any]], Any]:
    return {"vision": _vision_class, "audio": _audio_class}.get(kind, _language_class)


def _language_class(directory: Path, config: dict[str, Any]) -> Any:
    return importlib.import_module("transformers").AutoModelForCausalLM


def _audio_class(directory: Path, config: dict[str, Any]) -> Any:
    """The class that the configuration names, if it is one of an audio language model."""
    transformers = importlib.import_module("transformers")
    named = config.get("architectures") or []
    if len(named) != 1 or named[0] not in _AUDIO_CLASSES:
        raise CheckpointError(
            f'{directory} holds {", ".join(map(str, named)) or "a model of no class"} ("architectures" of its '
            f"config.json); expected one of {', '.join(_AUDIO_CLASSES)}."
        )
    return getattr(transformers, named[0])


def _vision_class(directory: Path, config: dict[str, Any]) -> Any:
    """The class that the configuration names, if it is the plain model of its type or one that classifies."""
    transformers = importlib.import_module("transformers")
    named = config.get("architectures") or []
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    known: list[str] = []
    for mapping in (auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES):
        found = mapping.get(config["model_type"], ())
        known += [found] if isinstance(found, str) else list(found)
    if len(named) != 1 or named[0] not in known:
        raise CheckpointError(
            f'{directory} holds {", ".join(map(str, named)) or "a model of no class"} ("architectures" of its '
            f"config.json); expected one of {', '.join(known)}."
        )
    return getattr(transformers, named[0])


def _model(
    directory: Path,
    dtype: torch.dtype | str,
    source: dict[str, Any] | None,
    find_class: Callable[[Path, dict[str, Any]], Any],
    config: dict[str, Any],
) -> Any:
    # Not at the top: importing it takes seconds, and a refused directory should be refused at once.
    transformers = importlib.import_module("transformers")
    whole = find_class(directory, config)
    with quiet_transformers(), _refused(directory, whole):
        if source is None:
            build = whole.from_pretrained
            source = {"pretrained_model_name_or_path": directory, "trust_remote_code": False}
        else:
            # The class by its configuration: there is no directory to look for one in.
            build = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(source["config"])].from_pretrained
        model, info = build(
            **source,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} weights of a {type(model).__name__}: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Expected all of them; "
            "they would be drawn at random. Is it a complete model of that class?"
        )
    unexpected = sorted(info.get("unexpected_keys", ()))
    if unexpected and getattr(model, "is_quantized", False):
        raise CheckpointError(
            f"{directory} holds {len(unexpected)} tensors that its description of a quantized "
            f"{type(model).__name__} has no place for: {', '.join(unexpected[:5])}"
            f"{' ...' if len(unexpected) > 5 else ''}. Without them the model would be another one: "
            "load it with the version of Postlude and transformers that wrote it."
        )
    return model


@contextlib.contextmanager
def _refused(directory: Path, whole: Any = None) -> Iterator[None]:
    """What transformers raises while it reads a directory, as an error that names it."""
    transformers = importlib.import_module("transformers")
    invalid = importlib.import_module("huggingface_hub.errors").StrictDataclassError
    try:
        yield
    except (
        ValueError, KeyError, OSError, RuntimeError, TypeError, AttributeError, invalid
    ) as error:  # fmt: skip
        # transformers says which weights do not fit in a log line only.
        other = _other_shape(directory, whole) if "ignore_mismatched_sizes" in str(error) else ""
        raise CheckpointError(
            other
            or f"transformers {transformers.__version__} cannot load {directory}: {type(error).__name__}: {error}"
        ) from error


def _other_shape(directory: Path, whole: Any) -> str:
    """The first weight of another shape than its configuration asks for; empty where none is found by its name."""
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model = getattr(whole, "from_config", whole)(config)
    asked = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in weight_files(directory):
        for name, entry in read_header(file).items():
            if asked.get(name, entry["shape"]) != entry["shape"]:
                return (
                    f"{file} holds {name} {entry['shape']}, and the config.json beside it asks for {asked[name]}: one "
                    "of them is of another model. Copy or download them again."
                )
    return ""


def _tokenizer(directory: Path) -> Any:
    return _beside_weights(directory, _TOKENIZER_FILES, "AutoTokenizer", "tokenizer")


def _processor(directory: Path) -> Any:
    return _beside_weights(directory, _PROCESSOR_FILES, "AutoImageProcessor", "image processor")


def _audio_processor(directory: Path) -> Any:
    return _beside_weights(directory, _AUDIO_PROCESSOR_FILES, "AutoProcessor", "audio processor")


def _beside_weights(directory: Path, files: tuple[str, ...], loader: str, name: str) -> Any:
    """What a class of transformers reads from any of these files; None where there is none of them."""
    if not any((directory / file).is_file() for file in files):
        return None
    transformers = importlib.import_module("transformers")
    with quiet_transformers():
        try:
            return getattr(transformers, loader).from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot load the {name} of {directory}: "
                f"{type(error).__name__}: {error}"
            ) from error


def dtype_of(dtype: str | torch.dtype) -> torch.dtype | str:
    """A type by its name; ``"auto"`` stays what it is.

    Raises:
        SettingsError: another name.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return name
    if name not in _DTYPES:
        raise SettingsError(f"dtype is {name!r}; expected auto, {', '.join(_DTYPES)}")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return chosen
