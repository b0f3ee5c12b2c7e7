"""TODO."""

from typing import Any, Literal

from pydantic import Field

from ldm.config import Config

LOCAL, HUB, CONVERTED = "local-dir:", "hf-hub:", "converted"


class TextConfig(Config):
    """Which tower, and what to take from it."""

    model: str = "latest"
    """`local-dir:FOLDER`, an open_clip name such as ViT-H-14, `hf-hub:ORG/NAME`; `latest`: the newest finished
    train_clip run beside this one; `none`: no text"""
    pretrained: str | None = None
    """open_clip's tag of the weights, such as laion2b_s32b_b79k, when `model` is an open_clip name"""
    layer: Literal["last", "penultimate"] = "last"
    """whose token states condition the U-Net; Stable Diffusion 2 takes the penultimate"""
    final_layer_norm: bool = True
    """put the states through the tower's final layer norm; Stable Diffusion XL does not"""
    pad_token_id: int | None = Field(None, ge=0)
    """token that fills prompts up to the limit and is seen by the U-Net, as in Stable Diffusion: 49407 in 1, 0 in 2;
    left out, prompts end where they end"""
    use_pooled: bool = False
    """also condition on the pooled vector, added to the time embedding"""
    zero_empty_prompt: bool = False
    """zeros are the states of an empty prompt, as in Stable Diffusion XL, instead of what the tower says of it"""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the states beside the weights."""
        return self.model_dump(exclude={"model", "pretrained"})
