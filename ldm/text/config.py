"""The settings of a text tower, and how one is named."""

from typing import Any, Literal

from pydantic import Field

from ldm.config import Config

LOCAL, HUB, CONVERTED = "local-dir:", "hf-hub:", "converted"  # prefixes of `model`; a tower read from another format


class TextConfig(Config):
    """Which tower to load, and which of its outputs condition the U-Net."""

    model: str = "latest"
    """`local-dir:FOLDER`, an open_clip name such as ViT-H-14, `hf-hub:ORG/NAME`; `latest`: the newest finished
    train_clip run in the folder of this run; `none`: no text"""
    pretrained: str | None = None
    """open_clip's tag of the weights, such as laion2b_s32b_b79k, when `model` is an open_clip name"""
    layer: Literal["last", "penultimate"] = "last"
    """whose hidden states condition the U-Net; penultimate in Stable Diffusion 2"""
    final_layer_norm: bool = True
    """apply the tower's final layer norm to the hidden states; not in Stable Diffusion XL"""
    pad_token_id: int | None = Field(None, ge=0)
    """pad prompts to the context length with this token, which the U-Net attends to, as in Stable Diffusion: 49407 in
    1, 0 in 2; left out, padding is masked"""
    use_pooled: bool = False
    """also condition on the pooled embedding, added to the time embedding"""
    zero_empty_prompt: bool = False
    """encode the empty prompt as zeros (Stable Diffusion XL) instead of running the tower"""

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the embeddings, apart from the weights."""
        return self.model_dump(exclude={"model", "pretrained"})
