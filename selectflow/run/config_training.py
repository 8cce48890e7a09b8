"""The sections of a run's configuration on the model and how it is trained."""

from typing import Annotated, Literal

from pydantic import Field

from selectflow.options import Count, Section, must_be

Beta = Annotated[float, Field(ge=0, lt=1)]
_AUTOCAST = (
    "bf16 or null (not fp16: its gradients underflow unless the loss is scaled, and a scaler skips "
    "steps that the look-ahead counts on; bf16 has the range of float32)"
)


def _is_autocast(value: object) -> bool:
    return value in ("bf16", None)


class ModelConfig(Section):
    """The network that is trained."""

    name: Literal["mlp", "cnn", "resnet18", "gpt2", "llama"] = Field(
        default="mlp",
        description="architecture: mlp, cnn, resnet18 (trainers/vision.py), gpt2, llama "
        "(trainers/language.py)",
    )
    hidden: tuple[Count, ...] = Field(
        default=(128, 128), strict=False, description="units of each hidden layer (mlp)"
    )
    width: Count = Field(
        default=16,
        description="channels of the first convolution (cnn); size of a token's embedding, a "
        "multiple of `heads` (gpt2, llama)",
    )
    num_classes: Count | None = Field(
        default=None,
        description="classes; null: as many as the labels have, all of which are then read before "
        "the first step (mlp, cnn, resnet18)",
    )
    layers: Count = Field(default=4, description="transformer blocks (gpt2, llama)")
    heads: Count = Field(default=4, description="attention heads of a block (gpt2, llama)")
    positions: Count | None = Field(
        default=None,
        description="longest sequence, in tokens; null: that of the data (gpt2, llama)",
    )
    pretrained: str | None = Field(
        default=None,
        description="weights to begin with: a folder of save_pretrained or a Hugging Face name, "
        "whose sizes then hold (gpt2, llama)",
    )
    lora_rank: int = Field(
        default=0, ge=0, description="rank of LoRA adapters; 0: every weight is trained"
    )


class OptimizerConfig(Section):
    """The optimizer, with the names and meanings of torch.optim."""

    name: Literal["adamw", "sgd"] = Field(default="adamw", description="torch.optim.AdamW or SGD")
    lr: float = Field(default=3e-3, gt=0, description="learning rate")
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="decay per update; decoupled in adamw, added to the gradient in sgd",
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), strict=False, description="decay of exp_avg and of exp_avg_sq (adamw)"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of exp_avg_sq (adamw)")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum (sgd)")
    max_grad_norm: float | None = Field(
        default=None, gt=0, description="clip the gradient to this norm; null: no clipping"
    )


class TrainConfig(Section):
    """How the gradient of an update is computed. Scores and look-aheads are in float32, whole."""

    accumulate: Count = Field(
        default=1,
        description="micro-batches that the kept samples of an update are passed in, one after the "
        "other: less memory, the same gradient (but for batch norm)",
    )
    autocast: Annotated[Literal["bf16"] | None, must_be(_AUTOCAST, _is_autocast)] = Field(
        default=None,
        description="bf16: matrix products of the training step in bfloat16; parameters, their "
        "gradients and all scores stay in float32. null: everything in float32",
    )
    checkpointing: bool = Field(
        default=False,
        description="recompute the activations of each transformer block in the backward pass of "
        "the training step: less memory, the same gradient, a third more time (gpt2, llama)",
    )
    compile: bool = Field(
        default=False,
        description="torch.compile the model of the training step: its first steps take long, and "
        "it needs a C++ compiler",
    )
