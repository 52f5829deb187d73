"""
llava_onevision.py - LLaVA-OneVision (0.5B and 7B): what it does differently from llava_min.py.

Needs   torch, safetensors, tokenizers, pillow, numpy; beside it llava_min.py and its files, siglip_vit.py, qwen2.py.
Run     python llava_onevision.py --model FOLDER --image photo.jpg --question "Is the cup red or blue?"
Use     model = load("FOLDER"); p = model.prompt("Is it red?", open_image("photo.jpg")); model.generate(p)
Matches the original (LLaVA-VL/LLaVA-NeXT) in its own and transformers' layout  (tests/test_onevision.py)
Paper   LLaVA-OneVision, https://arxiv.org/abs/2408.03326

    tower      SigLIP, whose last block is left out, and no class token.
    decoder    Qwen2. A ChatML prompt with a system turn; no BOS.
    photo      AnyRes with tiles of up to 6 x 6 views ("anyres_max_9"). If their patches, without padding, are more than
               1.1^2 times those of 9 views, the map of features is scaled down to 9 views' worth, bilinearly:

               36 views of 27 x 27 patches           81 x 81 features          each from the 2 x 2 patches around
               162 x 162 features              ->    + a newline a row         the middle of its part of the map

Shapes  N views  P patches of a view  C width  n image tokens

Left out on purpose: several images, video.
"""
import re
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F

import llava_min
import qwen2
import siglip_vit
import vicuna
from llava_min import check
from views import Geometry, tile_map


def reads(raw):
    """Is this config.json, as a dict, of a LLaVA-OneVision?"""
    tower = raw.get("mm_vision_tower")
    return raw.get("model_type") == "llava_onevision" or isinstance(tower, str) and (
        "siglip" in tower.lower() or str(raw.get("image_aspect_ratio")).startswith("anyres_max"))


@dataclass(frozen=True)
class Config(llava_min.Config):
    most: int = 9                                  # views' worth of features that tiles may have, see views.Geometry

    tower_file, decoder_file = siglip_vit, qwen2

    @property
    def geometry(self):
        return Geometry(self.vision.image, self.vision.patch, "anyres", self.pinpoints, self.preprocess, most=self.most)

    @property
    def template(self):
        before, after = qwen2.TEMPLATE                              # transformers' chat template has no system turn
        return (before[before.rindex("<|im_start|>"):] if self.preprocess == "hf" else before), after

    @classmethod
    def from_json(cls, raw, tower=None):
        """A checkpoint's config.json, as a dict, -> Config. ValueError names a setting that is not implemented.

        tower: SigLIP's own config, as a dict, where the checkpoint's does not describe it (original layout).
        """
        if "text_config" in raw:
            return cls.from_hf(raw)
        check(raw, mm_projector_type="mlp2x_gelu", mm_vision_select_feature="patch", mm_use_im_start_end=False,
              mm_use_im_patch_token=False, mm_resampler_type=None, mm_patch_merge_type="spatial_unpad")
        vision = siglip_vit.Config.from_json(tower)
        # The original builds all of SigLIP and deletes its last block; mm_vision_select_layer is never read.
        vision = siglip_vit.check_sizes(replace(vision, layers=vision.layers - 1))
        return cls(qwen2.Config.from_json(raw), vision, "anyres",
                   pinpoints(raw.get("image_grid_pinpoints"), vision.image), -1,
                   most=views_in(raw.get("image_aspect_ratio")))

    @classmethod
    def from_hf(cls, raw):
        """The same in the transformers layout, where text_config and vision_config describe the two parts."""
        check(raw, vision_feature_select_strategy="full", projector_hidden_act="gelu", quantization_config=None,
              multimodal_projector_bias=True, use_image_newline_parameter=True, model_type="llava_onevision")
        layer = raw.get("vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise ValueError(f"config.json sets vision_feature_layer={layer!r}; one layer is implemented")
        text = {"model_type": "qwen2", **(raw.get("text_config") or {})}
        # <image> has the first id after the real vocabulary. The rows from there on are not words, and are left out.
        text["vocab_size"] = raw.get("image_token_index", raw.get("image_token_id", 151646))
        vision = siglip_vit.Config.from_json({
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
            "image_size": 384, "patch_size": 14, **(raw.get("vision_config") or {})})
        grid = raw.get("image_grid_pinpoints") or "(1x1),...,(6x6)"
        return cls(qwen2.Config.from_json(text), vision, "anyres", pinpoints(grid, vision.image), layer,
                   most=views_in(raw.get("vision_aspect_ratio", "anyres_max_9")))


def views_in(aspect):
    """"anyres_max_9" -> 9. ValueError: it is another kind of aspect."""
    if not (m := re.fullmatch(r"anyres_max_([1-9]\d?)", str(aspect))):
        raise ValueError(f"config.json sets an image aspect of {aspect!r}; anyres_max_N is implemented")
    return int(m[1])


def pinpoints(grid, image):
    """image_grid_pinpoints -> canvases (width, height) in px. A list of them; or a text, the first and last grid of
    views in "(1x1),...,(6x6)". ValueError: it is neither."""
    if isinstance(grid, str):
        if not (pairs := re.findall(r"\((\d{1,2})x(\d{1,2})\)", grid)):
            raise ValueError(f"config.json sets image_grid_pinpoints={grid!r}, which is no list of tiles like "
                             "(1x1),...,(6x6)")
        (a, b), (c, d) = (tuple(map(int, pair)) for pair in (pairs[0], pairs[-1]))
        grid = [(i * image, j * image) for i in range(a, c + 1) for j in range(b, d + 1)]
    if not isinstance(grid, list) or not all(isinstance(pair, list | tuple) for pair in grid):
        raise ValueError(f"config.json sets image_grid_pinpoints={grid!r}, which is no list of sizes")
    return tuple(map(tuple, grid))


class LLaVA(llava_min.LLaVA):
    """As llava_min's, but for the image tokens."""

    def image_features(self, p):
        """Prompt -> its image tokens (n, C): the first view's patches, then the map of tiles, a newline to each row."""
        (rows, cols), n = tile_map(p.size, p.geometry), p.geometry.side
        if (rows.out, cols.out) == (rows.kept, cols.kept):
            return super().image_features(p)
        features = self.mm_projector(self.patch_features(p).to(self.decoder.norm.weight.dtype))    # (N P, C)
        base, C = features[:n * n], features.shape[1]
        tiles = features[n * n:].view(rows.views, cols.views, n, n, C).transpose(1, 2)
        tiles = tiles.reshape(rows.views * n, cols.views * n, C)
        kept = tiles[rows.start:rows.start + rows.kept, cols.start:cols.start + cols.kept]
        # No antialias and, after the projector, not before: both as in the original.
        less = F.interpolate(kept.permute(2, 0, 1)[None], (rows.out, cols.out), mode="bilinear")[0].permute(1, 2, 0)
        newline = self.image_newline.expand(rows.out, 1, C)
        return torch.cat((base, torch.cat((less, newline), 1).flatten(0, 1)))


# ---------------------------------------------------------------------------------------------------- loading

def read_config(files, preprocess="llava"):
    """Files -> Config; opens no weights. ValueError names the file and what is wrong with it.

    Two facts are not in config.json. In the original layout, whose loader cuts the head to the tokenizer's length, only
    the tokenizer knows how many words there are. And the head is the embeddings' matrix if the files hold no head.
    """
    c = llava_min.read_config(files, preprocess, Config)
    if files.tower and files.tower.weights:
        raise ValueError(f"{files.config.parent} holds no vision tower: a LLaVA-OneVision has its own, a trained one")
    text = replace(c.text, tied=not any(
        name.endswith("lm_head.weight") for file in files.weights for name in vicuna.stored(file)))
    if files.tower:                                                 # the original layout alone names one
        words = qwen2.load_tokenizer(files.tokenizer.parent).get_vocab_size()
        if words > text.vocab:
            raise ValueError(f"{files.tokenizer} has {words} tokens, the model {text.vocab}: it is not its tokenizer")
        text = replace(text, vocab=words)
    return replace(c, text=text)


load = partial(llava_min.load, family=sys.modules[__name__])


def main():
    llava_min.main(__doc__, load, None)


if __name__ == "__main__":
    main()
