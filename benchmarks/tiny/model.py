"""flashvlm-tiny: its configuration, tokenizer, fast forward passes for training, and the checkpoint on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import scenes
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

WIDTH = 192
COUNT_ALIKE, COUNT_MIDDLE = 5.5, 6.0
VISION_HEADS = 4
LLM_HEADS = 4
TOKENS = scenes.GRID * scenes.GRID
# Longest question with "assistant :" and its answer.
ANSWER_STEPS = 16

_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
_FUNCTION = "user assistant : ? . , what which how many is there a an the colour shape word number beside are objects"
_FUNCTION += " object at on in or of left right top bottom middle above below yes no"
VOCABULARY = [*_SPECIAL, *_FUNCTION.split(), *scenes.COLOURS, *scenes.SHAPES, *scenes.PLURALS, *scenes.COUNTS]
VOCABULARY += [*scenes.WORDS, *scenes.NUMBERS]
IDS = {word: number for number, word in enumerate(VOCABULARY)}
# What stands before the image's tokens: "<s> user :".
OPENING = [IDS["<s>"], IDS["user"], IDS[":"]]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def encode(text: str) -> list[int]:
    """The tokenizer's ids for a question, without opening and without its overhead."""
    return [IDS[word] for word in re.findall(r"\w+|[^\w\s]+", text.lower())]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, lower case."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", IDS["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config() -> LlavaConfig:
    """LLaVA-1.5 in small: 336 px, 576 tokens, features of the last but one of six vision layers, without CLS."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=6,
            num_attention_heads=VISION_HEADS,
            image_size=scenes.SIDE,
            patch_size=scenes.PATCH,
            projection_dim=WIDTH,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=LLM_HEADS,
            num_key_value_heads=LLM_HEADS,
            vocab_size=len(VOCABULARY),
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=IDS["<s>"],
            eos_token_id=IDS["</s>"],
            pad_token_id=IDS["<pad>"],
        ),
        image_token_index=IDS["<image>"],
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def sines(x: Tensor, y: Tensor, frequencies: int) -> Tensor:
    """``[..., 4 * frequencies]``: sines and cosines of two coordinates in 0..1, half a wave to ``frequencies / 2``."""
    waves = torch.pi * 2 ** torch.linspace(0, 3.6, frequencies)
    angles = torch.cat([x[..., None] * waves, y[..., None] * waves], -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


def make_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Fresh weights whose attention starts with habits that would take a model this small long to find.

    Vision: positions are two-dimensional sines, and the heads of four layers look at the neighbours of a patch.
    Language: two heads look at the last words, those of the second layer at what resembles the query, all later ones
    rather at words.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(make_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(0, 0.7 / parameter.shape[1] ** 0.5)
            elif name.endswith("patch_embedding.weight"):
                parameter.normal_(0, 0.5 / parameter[0].numel() ** 0.5)
        rows, columns = torch.meshgrid(*[(torch.arange(scenes.GRID) + 0.5) / scenes.GRID] * 2, indexing="ij")
        table = sines(columns.reshape(-1), rows.reshape(-1), WIDTH // 4)
        embeddings = model.model.vision_tower.embeddings
        embeddings.position_embedding.weight[1:] = table
        embeddings.position_embedding.weight[0] = 0
        embeddings.class_embedding.normal_(0, 0.5)
        for layer, reach in zip(model.model.vision_tower.encoder.layers, (1.0, 2.0, 1.0, 3.0), strict=False):
            _look_around(layer.self_attn, reach / scenes.GRID)
        words = model.model.language_model.embed_tokens.weight
        words.normal_(0, 0.3)
        for singular, plural in zip(scenes.SHAPES, scenes.PLURALS, strict=True):
            words[IDS[plural]] = words[IDS[singular]] + 0.5 * words[IDS[plural]]
        # The same for every word, so that attention to a place in the sentence has something to hold on to.
        words[:, 0] = 1
        # The same for every word that names objects.
        words[:, 1] = 0
        words[[IDS[word] for word in [*scenes.SHAPES, *scenes.PLURALS, "objects", "object"]], 1] = 1
        # The middle of an object (see Codebook in train.py), and what stands at the start of the prompt.
        words[:, 2] = 0
        words[IDS["<s>"]] = 0
        words[IDS["<s>"], 2] = 3
        model.lm_head.weight.copy_(0.08 * words)
        first, second, third, last = model.model.language_model.layers
        _look_back(first.self_attn, {0: 1, 1: 2}, 1.8)
        _look_alike(second.self_attn, range(LLM_HEADS))
        _count(second.self_attn, 3, words)
        # "? ASSISTANT :" stands between the last word of a question and the answer.
        _look_back(third.self_attn, {0: 3}, 7.0)
        _prefer(third.self_attn, [1, 2], 1, 14.0)
        _prefer(third.self_attn, [3], 0, 10.0)
        for layer in (second, third, last):
            _copy(layer.self_attn, range(LLM_HEADS))
        _look_alike(last.self_attn, [0, 1])
        _prefer(last.self_attn, [2], 0, 8.0)
        for layer in (first, second, third, last):
            layer.self_attn.o_proj.weight[:3] = 0
            layer.mlp.down_proj.weight[:3] = 0
    return model


def _look_around(attention: nn.Module, reach: float) -> None:
    """Queries that match the keys of places ``reach`` (of the side) to the left, right, above and below, a head each.

    Sines of x + d are a rotation of the sines of x; so the query's weights are the key's, rotated.
    """
    size = WIDTH // VISION_HEADS
    for head, (across, down) in enumerate([(-reach, 0.0), (reach, 0.0), (0.0, -reach), (0.0, reach)]):
        rows = slice(head * size, (head + 1) * size)
        # A quarter of the waves for each head, their sines and their cosines.
        key = 1.6 * torch.eye(WIDTH)[head::VISION_HEADS]
        shift = sines(torch.tensor(across), torch.tensor(down), WIDTH // 4)
        sine, cosine = shift[: WIDTH // 2].diag_embed(), shift[WIDTH // 2 :].diag_embed()
        turn = torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)])
        attention.k_proj.weight[rows] = key
        attention.q_proj.weight[rows] = key @ turn


def _look_back(attention: nn.Module, distances: dict[int, int], strength: float) -> None:
    """Heads that copy the word at a distance, by the fastest waves of the rotary embedding."""
    size, waves = WIDTH // LLM_HEADS, 6
    for head, distance in distances.items():
        rows = slice(head * size, (head + 1) * size)
        angle = distance * 1e6 ** (-2 * torch.arange(waves) / size)
        for projection, cosine, sine in (
            (attention.q_proj, angle.cos(), -angle.sin()),
            (attention.k_proj, torch.ones(waves), torch.zeros(waves)),
        ):
            weight = projection.weight[rows]
            weight.zero_()
            weight[:waves, 0], weight[size // 2 : size // 2 + waves, 0] = strength * cosine, strength * sine
    _copy(attention, distances)


def _copy(attention: nn.Module, heads: Iterable[int]) -> None:
    """Heads that pass on, in place, what they look at: a quarter of the space each."""
    size = WIDTH // LLM_HEADS
    space = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    for head in heads:
        rows = slice(head * size, (head + 1) * size)
        attention.v_proj.weight[rows] = space[rows]
        attention.o_proj.weight[:, rows] = 1.5 * space[rows].T


def _look_alike(attention: nn.Module, heads: Iterable[int]) -> None:
    """Heads that find what resembles the query, by the slow waves, which do not care for the distance."""
    size, fast = WIDTH // LLM_HEADS, 10
    for head in heads:
        for half in range(2):
            rows = slice(head * size + half * size // 2 + fast, head * size + (half + 1) * size // 2)
            alike = 1.7 * torch.randn(size // 2 - fast, WIDTH) / WIDTH**0.5
            attention.q_proj.weight[rows] = alike
            attention.k_proj.weight[rows] = alike
    # The query itself is a word, and nothing is more alike.
    _prefer(attention, heads, 0, -6.0)


def _count(attention: nn.Module, head: int, words: Tensor) -> None:
    """A head whose attention goes to the middles of objects of the colour or shape asked for, and to "<s>".

    The share of "<s>" tells how many there are.
    """
    size = WIDTH // LLM_HEADS
    rows = slice(head * size, (head + 1) * size)
    attributes = words[[IDS[word] for word in [*scenes.COLOURS, *scenes.SHAPES]]].clone()
    attributes[:, :3] = 0
    dual = torch.linalg.pinv(attributes).T
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[rows] = 0
        slow = projection.weight[rows].view(2, size // 2, WIDTH)[:, 17:]
        slow.copy_(COUNT_ALIKE * dual.view(2, 7, WIDTH))
    attention.q_proj.weight[rows][16, 0] = COUNT_MIDDLE
    attention.k_proj.weight[rows][16, 2] = COUNT_MIDDLE
    attention.q_proj.weight[rows][15, 0] = 6.0
    attention.k_proj.weight[rows][15, 0] = -6.0


def _prefer(attention: nn.Module, heads: Iterable[int], component: int, strength: float) -> None:
    """One slow wave of each head that seeks (shuns, if ``strength`` is negative) a component of the embeddings."""
    size = WIDTH // LLM_HEADS
    rows = torch.tensor([head * size + 10 for head in heads])
    attention.q_proj.weight[rows] = 0
    attention.k_proj.weight[rows] = 0
    attention.q_proj.weight[rows, 0] = abs(strength)
    attention.k_proj.weight[rows, component] = strength


def vision_features(tower: nn.Module, patches: Tensor, index: Tensor | None = None) -> Tensor:
    """Output of the last but one layer, CLS first: ``[B, 1 + K, C]``.

    ``patches`` ``[B, K, 588]`` normalised pixels; ``index`` ``[B, K]`` their places on the grid, None for all 576. The
    same numbers as the library's; written out because its attention's backward pass is slow on a CPU.
    """
    table = tower.embeddings.position_embedding.weight
    kernel = tower.embeddings.patch_embedding.weight
    hidden = F.linear(patches.to(kernel.dtype), kernel.flatten(1))
    hidden = hidden + (table[1:] if index is None else table[1:][index])
    cls = (tower.embeddings.class_embedding + table[0]).expand(len(patches), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([cls, hidden], 1))
    for layer in list(tower.encoder.layers)[:-1]:
        hidden = _vision_layer(layer, hidden)
    return hidden


def _vision_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    batch, length, width = hidden.shape
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    shape = (batch, length, VISION_HEADS, width // VISION_HEADS)
    query = (attention.q_proj(normed) * (width // VISION_HEADS) ** -0.5).view(shape).transpose(1, 2)
    key = attention.k_proj(normed).view(shape).permute(0, 2, 3, 1)
    value = attention.v_proj(normed).view(shape).transpose(1, 2)
    mixed = (query @ key).softmax(-1) @ value
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
    return hidden + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.layer_norm2(hidden))))


def project(projector: nn.Module, features: Tensor) -> Tensor:
    """The projector of LLaVA."""
    return projector.linear_2(F.gelu(projector.linear_1(features)))


def _rotation(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = WIDTH // LLM_HEADS
    angles = positions[..., None].float() * 1e6 ** (-torch.arange(0, size, 2).float() / size)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    return x * rotation[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * rotation[1]


def language_states(llm: nn.Module, visual: Tensor, index: Tensor | None, questions: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of questions that share an image: after the second layer, and after the last norm.

    ``visual`` ``[B, K, D]`` stands once for all ``questions`` ``[B, Q, T]``, which do not see each other; each gets the
    positions that it would have alone behind 576 visual tokens. Returns two of ``[B, Q, T, D]``.
    """
    batch, count, steps = questions.shape
    dtype = visual.dtype
    table = llm.embed_tokens.weight
    opening = table[torch.tensor(OPENING)].expand(batch, -1, -1)
    first = len(OPENING)
    if index is None:
        index = torch.arange(visual.shape[1]).expand(batch, -1)
    places = torch.cat([torch.arange(first).expand(batch, -1), first + index], 1)
    behind = (first + TOKENS + torch.arange(steps)).repeat(count).expand(batch, -1)
    rotation = _rotation(torch.cat([places, behind], 1), dtype)
    hidden = torch.cat([opening, visual, table[questions.reshape(batch, -1)]], 1)
    prefix = places.shape[1]
    causal = torch.full((prefix, prefix), -torch.inf, dtype=dtype).triu(1)
    middle = hidden
    for number, layer in enumerate(llm.layers):
        hidden = _language_layer(layer, hidden, rotation, prefix, (count, steps), causal)
        if number == 1:
            middle = hidden
    shape = (batch, count, steps, WIDTH)
    return middle[:, prefix:].reshape(shape), llm.norm(hidden[:, prefix:]).reshape(shape)


def _norm(module: nn.Module, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, (hidden.shape[-1],), module.weight, module.variance_epsilon)


def _language_layer(
    layer: nn.Module,
    hidden: Tensor,
    rotation: tuple[Tensor, Tensor],
    prefix: int,
    questions: tuple[int, int],
    causal: Tensor,
) -> Tensor:
    batch, length, width = hidden.shape
    size = width // LLM_HEADS
    attention = layer.self_attn
    normed = _norm(layer.input_layernorm, hidden)
    shape = (batch, length, LLM_HEADS, size)
    query = _rotate(attention.q_proj(normed).view(shape).transpose(1, 2), rotation) * size**-0.5
    key = _rotate(attention.k_proj(normed).view(shape).transpose(1, 2), rotation)
    value = attention.v_proj(normed).view(shape).transpose(1, 2)
    image_key, image_value = key[:, :, :prefix], value[:, :, :prefix]
    image = (query[:, :, :prefix] @ image_key.transpose(-1, -2) + causal).softmax(-1) @ image_value
    own = (batch, LLM_HEADS, *questions, size)
    asked = query[:, :, prefix:]
    seen = (asked @ image_key.transpose(-1, -2)).view(batch, LLM_HEADS, *questions, prefix)
    steps = questions[1]
    within = asked.reshape(own) @ key[:, :, prefix:].reshape(own).transpose(-1, -2) + causal[:steps, :steps]
    weights = torch.cat([seen, within], -1).softmax(-1)
    answer = weights[..., :prefix].reshape(batch, LLM_HEADS, -1, prefix) @ image_value
    answer = answer + (weights[..., prefix:] @ value[:, :, prefix:].reshape(own)).view(answer.shape)
    mixed = torch.cat([image, answer], 2).transpose(1, 2).reshape(batch, length, width)
    hidden = hidden + attention.o_proj(mixed)
    normed = _norm(layer.post_attention_layernorm, hidden)
    return hidden + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))


def save_checkpoint(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """Float16 weights, tokenizer, chat template and image processor, as transformers writes them."""
    model.to(torch.float16).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    side = scenes.SIDE
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        directory
    )
