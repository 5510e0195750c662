"""The keys and shapes of published detectors, as their code builds them, and what each is to us.

Read from these files (repository: file at commit):

- HDETR/H-Deformable-DETR: models/deformable_detr.py and models/deformable_transformer.py at
  22ae105aced6b5bc89e3582ce79e800a5c84e236, options in main.py at
  196001d4d22836f2bf916d2c937d4230a4ac5030;
- facebookresearch/detr: models/detr.py at 0217b40fb8064f6118aa9a92ae29c1ce87b0798f,
  models/transformer.py at 1d6a32809e9f37134dfc8fb9f792a9f131961788;
- IDEA-Research/DINO: models/dino/dino.py at 66d7173cc4167934381a898b07c08507bdd96b63,
  models/dino/deformable_transformer.py at 2a4df86c8d6c2583acdbfb44f72566d90f18978f,
  config/DINO/DINO_4scale.py at 67bbcd97ef30a48cf343b7b0f3ad9ea0795b6fcd;
- IDEA-Research/detrex: projects/dino/modeling/dino.py at 00ad3585869a766dcf6365d393e645dea3f9ad50,
  dino_transformer.py beside it at 19ee7aa8b03b9eb930604c51c8fe65f5f7737b38,
  projects/dino/configs/models/dino_r50.py at 053d06f2bf352151a4656bbca0e7d055f1d0d9ab,
  detrex/layers/{transformer,conv,mlp}.py at 63535d9ddfc6ed2ff1bce2f55dd34ae866b37877,
  47b9802913530a5f80142cf81f55b2fadd089860 and 45bc9afd168dc829b14b362fbe1713a969cbaba2,
  detrex/modeling/neck/channel_mapper.py at 13d7cd3d55f91604ebe1949e34a6cc1376963277;
- IDEA-Research/detrex: projects/align_detr/modeling/aligndetr.py at
  f34380d3652c0dbc8f9de911626117943a8208c4, whose keys are those of its DINO;
- IDEA-Research/Stable-DINO: projects/stabledino/modeling/dino_transformer.py and dino.py,
  projects/stabledino/configs/models/stabledino_r50.py at
  be8e1425a5e846b753c8eadd8d59e1056a82f144;
- xiuqhou/Relation-DETR: models/bricks/relation_transformer.py at
  092a6ebff0f0823cd74f66ff011e3630df2272f0, models/bricks/{base_transformer,basic,denoising}.py,
  models/detectors/relation_detr.py, models/necks/channel_mapper.py, models/backbones/resnet.py at
  7047657f5495e1358720d4557c60f25a827859a0, configs/relation_detr/relation_detr_resnet50_800_1333.py
  at c8ccd23141d521835db1cb2c37d4da68826857fb (its deformable attention and convolution with a norm
  were not at hand, and are taken to have the keys of detrex's and torchvision's);
- Mr. DETR, in copies of its code, as its own repository was not at hand:
  projects/mr_detr_deformable/modeling/deformable_detr.py of Jiangmm1/Omni-MambaDet at
  84903c094bc75bae64337afc4a1e86a9f526d7e3, deformable_transformer.py of jmm247894-gif/mamba-detr at
  211da19f4b35f764dd768db12e09cfb3d030d85e, and a transformer.py beside one of these;
- open-mmlab/mmdetection: mmdet/models/detectors/deformable_detr.py at
  013e5419cb60fb12003b55535ee76c31b9248249, detectors/dino.py at
  fe3f809a0a514189baf889aa358c498d51ee36cd, layers/transformer/{detr,deformable_detr,dino}_layers.py
  at 7ece1f0a85052b4d88fcb6336ebc8401642ee15e, 19bceba56284d440278e80cfde1d95460330ccbb and
  013e5419cb60fb12003b55535ee76c31b9248249, dense_heads/deformable_detr_head.py at
  f40b062e8e7f8156303f2b9ded8f4c3fa491b2f3, necks/channel_mapper.py at
  2367856781633a5eb8d4f3b8d42875e50ae5b0dc, configs/dino/dino-4scale_r50_8xb2-12e_coco.py at
  4c111175692fb607b153282bf15c81c8e7f8edcc.

Sizes here are small, but for the backbone, which is ResNet-18.
"""

from collections.abc import Callable

import torchvision

WIDTH, FFN, HEADS, LEVELS, POINTS, QUERIES, HYBRID = 32, 24, 8, 4, 4, 7, 5
ENCODER, DECODER = 2, 3  # layers
TOKENS = 10  # of Mr. DETR

Entry = tuple[str, str, tuple[int, ...]]  # their key, ours, shape
Block = list[tuple[str, tuple[int, ...]]]  # keys inside a module, and shapes


def linear(inputs: int, outputs: int) -> Block:
    return [("weight", (outputs, inputs)), ("bias", (outputs,))]


def norm(width: int = WIDTH) -> Block:
    return [("weight", (width,)), ("bias", (width,))]


def within(name: str, block: Block) -> Block:
    return [(f"{name}.{key}", shape) for key, shape in block]


def deformable_attention() -> Block:
    places = HEADS * LEVELS * POINTS
    return [
        *within("sampling_offsets", linear(WIDTH, 2 * places)),
        *within("attention_weights", linear(WIDTH, places)),
        *within("value_proj", linear(WIDTH, WIDTH)),
        *within("output_proj", linear(WIDTH, WIDTH)),
    ]


def attention() -> Block:
    return [
        ("in_proj_weight", (3 * WIDTH, WIDTH)),
        ("in_proj_bias", (3 * WIDTH,)),
        *within("out_proj", linear(WIDTH, WIDTH)),
    ]


def perceptron(*widths: int) -> Block:
    pairs = enumerate(zip(widths[:-1], widths[1:], strict=True))
    return [entry for i, (a, b) in pairs for entry in within(f"layers.{i}", linear(a, b))]


def box_head() -> Block:
    return perceptron(WIDTH, WIDTH, WIDTH, 4)


def module(theirs: str, ours: str, block: Block) -> list[Entry]:
    return [(f"{theirs}.{key}", f"{ours}.{key}", shape) for key, shape in block]


def torchvision_body(theirs: str) -> list[Entry]:
    """Return the body that keeps torchvision's names."""
    weights = torchvision.models.resnet18().state_dict()
    return [
        (f"{theirs}.{key}", f"backbone.0.body.{key}", tuple(tensor.shape))
        for key, tensor in weights.items()
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    ]


def detectron2_body(theirs: str) -> list[Entry]:
    """Return a body of basic blocks with frozen norms; each norm is inside its convolution."""
    entries: list[Entry] = []

    def convolution(name: str, conv: str, bn: str, shape: tuple[int, ...]) -> None:
        entries.append((f"{theirs}.{name}.weight", f"backbone.0.body.{conv}.weight", shape))
        for part in ("weight", "bias", "running_mean", "running_var"):
            entries.append(
                (f"{theirs}.{name}.norm.{part}", f"backbone.0.body.{bn}.{part}", shape[:1])
            )

    convolution("stem.conv1", "conv1", "bn1", (64, 3, 7, 7))
    for stage in range(4):
        width, before = 64 * 2**stage, 64 * 2 ** max(stage - 1, 0)
        for block in range(2):
            inside, ours = f"res{stage + 2}.{block}", f"layer{stage + 1}.{block}"
            inputs = before if block == 0 else width
            if block == 0 and stage > 0:
                convolution(f"{inside}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1",
                            (width, inputs, 1, 1))  # fmt: skip
            convolution(f"{inside}.conv1", f"{ours}.conv1", f"{ours}.bn1", (width, inputs, 3, 3))
            convolution(f"{inside}.conv2", f"{ours}.conv2", f"{ours}.bn2", (width, width, 3, 3))
    return entries


def projections(name: Callable[[int], tuple[str, str]], *, bias: bool) -> list[Entry]:
    """Return projections of three maps, and one of a further level; `name` gives conv and norm."""
    entries = []
    for level, (inputs, size) in enumerate([(128, 1), (256, 1), (512, 1), (512, 3)]):
        conv, group_norm = name(level)
        ours = f"input_proj.{level}"
        entries += module(conv, f"{ours}.0", [("weight", (WIDTH, inputs, size, size))])
        if bias:
            entries += module(conv, f"{ours}.0", [("bias", (WIDTH,))])
        entries += module(group_norm, f"{ours}.1", norm())
    return entries


def official_layers() -> list[Entry]:
    """Return encoder and decoder as Deformable DETR, H-DETR and DINO build them."""
    feed_forward = [*within("linear1", linear(WIDTH, FFN)), *within("linear2", linear(FFN, WIDTH))]
    entries = []
    for layer in range(ENCODER):
        name = f"transformer.encoder.layers.{layer}"
        block = within("self_attn", deformable_attention()) + within("norm1", norm())
        entries += module(name, name, block + feed_forward + within("norm2", norm()))
    for layer in range(DECODER):
        name = f"transformer.decoder.layers.{layer}"
        block = within("cross_attn", deformable_attention()) + within("norm1", norm())
        block += within("self_attn", attention()) + within("norm2", norm())
        entries += module(name, name, block + feed_forward + within("norm3", norm()))
    return entries


def h_detr(num_classes: int = 91) -> list[Entry]:
    """Return H-DETR with two stages, refinement, mixed selection and a hybrid branch."""
    entries = torchvision_body("backbone.0.body") + official_layers()
    entries += projections(lambda i: (f"input_proj.{i}.0", f"input_proj.{i}.1"), bias=True)
    entries.append(("transformer.level_embed", "transformer.level_embed", (LEVELS, WIDTH)))
    for name, block in {
        "transformer.enc_output": linear(WIDTH, WIDTH),
        "transformer.enc_output_norm": norm(),
        "transformer.pos_trans": linear(2 * WIDTH, 2 * WIDTH),
        "transformer.pos_trans_norm": norm(2 * WIDTH),
    }.items():
        entries += module(name, name, block)
    entries.append(("query_embed.weight", "query_embed.weight", (QUERIES + HYBRID, WIDTH)))
    for head in range(DECODER + 1):
        for prefix in ("", "transformer.decoder."):
            classes, boxes = f"{prefix}class_embed.{head}", f"{prefix}bbox_embed.{head}"
            entries += module(classes, classes, linear(WIDTH, num_classes))
            entries += module(boxes, boxes, box_head())
    return entries


def detr(num_classes: int = 91) -> list[Entry]:
    """Return DETR. Its decoder looks at the image after the second norm, ours after the first."""
    feed_forward = [*within("linear1", linear(WIDTH, FFN)), *within("linear2", linear(FFN, WIDTH))]
    entries = torchvision_body("backbone.0.body")
    for layer in range(ENCODER):
        name = f"transformer.encoder.layers.{layer}"
        entries += module(f"{name}.self_attn", f"{name}.self_attn.attn", attention())
        block = feed_forward + within("norm1", norm()) + within("norm2", norm())
        entries += module(name, name, block)
    for layer in range(DECODER):
        name = f"transformer.decoder.layers.{layer}"
        entries += module(f"{name}.self_attn", f"{name}.self_attn", attention())
        entries += module(f"{name}.multihead_attn", f"{name}.cross_attn", attention())
        for theirs, ours in (("norm1", "norm2"), ("norm2", "norm1"), ("norm3", "norm3")):
            entries += module(f"{name}.{theirs}", f"{name}.{ours}", norm())
        entries += module(name, name, feed_forward)
    entries += module("transformer.decoder.norm", "transformer.decoder.norm", norm())
    entries += module("class_embed", "class_embed.0", linear(WIDTH, num_classes + 1))
    entries += module("bbox_embed", "bbox_embed.0", box_head())
    entries.append(("query_embed.weight", "query_embed.weight", (QUERIES, WIDTH)))
    projection = [("weight", (WIDTH, 512, 1, 1)), ("bias", (WIDTH,))]
    return entries + module("input_proj", "input_proj.0.0", projection)


def dino(num_classes: int = 91) -> list[Entry]:
    """Return the original DINO: heads that layers share, and the encoder's own."""
    entries = torchvision_body("backbone.0.body") + official_layers()
    entries += projections(lambda i: (f"input_proj.{i}.0", f"input_proj.{i}.1"), bias=True)
    entries.append(("transformer.level_embed", "transformer.level_embed", (LEVELS, WIDTH)))
    entries.append(("transformer.tgt_embed.weight", "query_embed.weight", (QUERIES, WIDTH)))
    entries.append(
        ("label_enc.weight", "recipes.denoising.label_enc.weight", (num_classes + 1, WIDTH))
    )
    for name, block in {
        "transformer.enc_output": linear(WIDTH, WIDTH),
        "transformer.enc_output_norm": norm(),
        "transformer.decoder.norm": norm(),
        "transformer.decoder.ref_point_head": perceptron(2 * WIDTH, WIDTH, WIDTH),
    }.items():
        entries += module(name, name, block)
    for head in range(DECODER):
        for prefix in ("", "transformer.decoder."):
            classes, boxes = f"{prefix}class_embed.{head}", f"{prefix}bbox_embed.{head}"
            entries += module(classes, classes, linear(WIDTH, num_classes))
            entries += module(boxes, boxes, box_head())
    encoder = "transformer.enc_out_{}_embed"
    entries += module(encoder.format("class"), f"class_embed.{DECODER}", linear(WIDTH, num_classes))
    entries += module(encoder.format("bbox"), f"bbox_embed.{DECODER}", box_head())
    return entries


def detrex_dino(num_classes: int = 80, *, fusion: bool = False) -> list[Entry]:
    """Return detrex's DINO: generic layers, whose parts go by their place in the order.

    With `fusion` it is Stable-DINO.
    """
    feed_forward = [
        *[("ffns.0.layers.0.0", "linear1", linear(WIDTH, FFN))],
        *[("ffns.0.layers.1", "linear2", linear(FFN, WIDTH))],
    ]
    encoder = [
        ("attentions.0", "self_attn", deformable_attention()),
        ("norms.0", "norm1", norm()), ("norms.1", "norm2", norm()), *feed_forward,
    ]  # fmt: skip
    decoder = [
        ("attentions.0.attn", "self_attn", attention()),
        ("attentions.1", "cross_attn", deformable_attention()),
        ("norms.0", "norm2", norm()), ("norms.1", "norm1", norm()), ("norms.2", "norm3", norm()),
        *feed_forward,
    ]  # fmt: skip
    entries = detectron2_body("backbone")
    entries += projections(_neck("norm"), bias=True)
    for side, count, parts in (("encoder", ENCODER, encoder), ("decoder", DECODER, decoder)):
        for layer in range(count):
            name = f"transformer.{side}.layers.{layer}"
            for theirs, ours, block in parts:
                entries += module(f"{name}.{theirs}", f"{name}.{ours}", block)
    entries.append(("transformer.level_embeds", "transformer.level_embed", (LEVELS, WIDTH)))
    entries.append(("transformer.tgt_embed.weight", "query_embed.weight", (QUERIES, WIDTH)))
    entries.append(("label_enc.weight", "recipes.denoising.label_enc.weight", (num_classes, WIDTH)))
    if fusion:
        name = "transformer.encoder.fusion_layer"
        entries += module(f"{name}.0", f"{name}.0", linear((ENCODER + 1) * WIDTH, WIDTH))
        entries += module(f"{name}.1", f"{name}.1", norm())
    for name, block in {
        "transformer.enc_output": linear(WIDTH, WIDTH),
        "transformer.enc_output_norm": norm(),
        "transformer.decoder.norm": norm(),
        "transformer.decoder.ref_point_head": perceptron(2 * WIDTH, WIDTH, WIDTH),
    }.items():
        entries += module(name, name, block)
    for head in range(DECODER + 1):
        for prefix in ("", "transformer.decoder."):
            classes, boxes = f"{prefix}class_embed.{head}", f"{prefix}bbox_embed.{head}"
            entries += module(classes, classes, linear(WIDTH, num_classes))
            entries += module(boxes, boxes, box_head())
    return entries


def relation_detr(num_classes: int = 91) -> list[Entry]:
    """Return Relation-DETR: official layers, heads inside the transformer, a hybrid branch."""
    entries = torchvision_body("backbone") + official_layers()
    entries += projections(lambda i: (f"neck.convs.{i}.0", f"neck.convs.{i}.1"), bias=False)
    entries.append(("transformer.level_embeds", "transformer.level_embed", (LEVELS, WIDTH)))
    for theirs, ours, rows in (
        ("transformer.tgt_embed", "query_embed", QUERIES),
        ("transformer.hybrid_tgt_embed", "recipes.hybrid.query_embed", HYBRID),
        ("denoising_generator.label_encoder", "recipes.denoising.label_enc", num_classes),
    ):
        entries.append((f"{theirs}.weight", f"{ours}.weight", (rows, WIDTH)))
    fusion, relation = "transformer.encoder.memory_fusion", "position_relation_embedding.pos_proj.0"
    for name, block in {
        "transformer.enc_output": linear(WIDTH, WIDTH),
        "transformer.enc_output_norm": norm(),
        f"{fusion}.0": linear((ENCODER + 1) * WIDTH, WIDTH),
        f"{fusion}.2": linear(WIDTH, WIDTH),
        f"{fusion}.3": norm(),
        "transformer.decoder.norm": norm(),
        "transformer.decoder.ref_point_head": perceptron(2 * WIDTH, WIDTH, WIDTH),
        "transformer.decoder.query_scale": perceptron(WIDTH, WIDTH, WIDTH),
        f"transformer.decoder.{relation}": [("weight", (HEADS, 64, 1, 1)), ("bias", (HEADS,))],
    }.items():
        entries += module(name, name, block)
    for head in range(DECODER):
        theirs = "transformer.decoder.{}_head." + str(head)
        entries += module(theirs.format("class"), f"class_embed.{head}", linear(WIDTH, num_classes))
        entries += module(theirs.format("bbox"), f"bbox_embed.{head}", box_head())
    for theirs, classes, boxes in (
        ("encoder", f"class_embed.{DECODER}", f"bbox_embed.{DECODER}"),
        ("hybrid", *(f"recipes.hybrid.encoder_heads.{part}" for part in ("score", "box"))),
    ):
        entries += module(f"transformer.{theirs}_class_head", classes, linear(WIDTH, num_classes))
        entries += module(f"transformer.{theirs}_bbox_head", boxes, box_head())
    return entries


def mr_detr(num_classes: int = 80) -> list[Entry]:
    """Return Mr. DETR on Deformable DETR with mixed selection, from detrex."""
    encoder = [
        ("attentions.0", "self_attn", deformable_attention()),
        ("norms.0", "norm1", norm()), ("norms.1", "norm2", norm()),
        ("ffns.0.layers.0.0", "linear1", linear(WIDTH, FFN)),
        ("ffns.0.layers.1", "linear2", linear(FFN, WIDTH)),
    ]  # fmt: skip
    decoder = [
        ("attentions.0.attn", "self_attn", attention()),
        ("attentions.0.norm_o2o", "norm2", norm()),
        ("attentions.1", "cross_attn", deformable_attention()),
        ("norms.0", "norm1", norm()), ("norms.1", "norm3", norm()),
        ("ffns.0.layers.0.linear.linear", "linear1", linear(WIDTH, FFN)),
        ("ffns.0.layers.1.linear", "linear2", linear(FFN, WIDTH)),
    ]  # fmt: skip
    entries = detectron2_body("backbone")
    entries += projections(_neck("norm"), bias=True)
    for side, count, parts in (("encoder", ENCODER, encoder), ("decoder", DECODER, decoder)):
        for layer in range(count):
            name = f"transformer.{side}.layers.{layer}"
            for theirs, ours, block in parts:
                entries += module(f"{name}.{theirs}", f"{name}.{ours}", block)
    own: list[tuple[str, str, Block]] = [
        ("attentions.0.norm_o2m", "norm", norm()),
        ("ffns.0.layers.0.linear.linear_sep", "feed_forward.linear1", linear(WIDTH, FFN)),
        ("ffns.0.layers.1.linear_sep", "feed_forward.linear2", linear(FFN, WIDTH)),
        ("attentions.0.instruction_o2m", "contents", [("weight", (TOKENS, WIDTH))]),
        ("attentions.0.instruction_o2m_pos", "positions", [("weight", (TOKENS, WIDTH))]),
    ]
    for layer in range(DECODER):
        name, recipe = f"transformer.decoder.layers.{layer}", f"recipes.mr.layers.{layer}"
        for theirs, ours, block in own:
            entries += module(f"{name}.{theirs}", f"{recipe}.{ours}", block)
    entries.append(("transformer.level_embeds", "transformer.level_embed", (LEVELS, WIDTH)))
    entries.append(("query_embedding.weight", "query_embed.weight", (QUERIES, WIDTH)))
    for name, block in {
        "transformer.enc_output": linear(WIDTH, WIDTH),
        "transformer.enc_output_norm": norm(),
        "transformer.pos_trans": linear(2 * WIDTH, 2 * WIDTH),
        "transformer.pos_trans_norm": norm(2 * WIDTH),
    }.items():
        entries += module(name, name, block)
    for theirs, ours, block in (
        ("class_embed_o2m_encoder", "score", linear(WIDTH, num_classes)),
        ("bbox_embed_enc_o2m", "box", box_head()),
    ):
        entries += module(
            f"transformer.decoder.{theirs}", f"recipes.mr.encoder_heads.{ours}", block
        )
    for head in range(DECODER + 1):
        for prefix in ("", "transformer.decoder."):
            classes, boxes = f"{prefix}class_embed.{head}", f"{prefix}bbox_embed.{head}"
            entries += module(classes, classes, linear(WIDTH, num_classes))
            entries += module(boxes, boxes, box_head())
    return entries


def mmdetection(variant: str, num_classes: int = 80) -> list[Entry]:
    """Return a detector of mmdetection 3: "plain", "refine", "two_stage" or "dino"."""
    feed_forward = [
        *[("ffn.layers.0.0", "linear1", linear(WIDTH, FFN))],
        *[("ffn.layers.1", "linear2", linear(FFN, WIDTH))],
    ]
    encoder = [
        ("self_attn", "self_attn", deformable_attention()), *feed_forward,
        ("norms.0", "norm1", norm()), ("norms.1", "norm2", norm()),
    ]  # fmt: skip
    decoder = [
        ("self_attn.attn", "self_attn", attention()),
        ("cross_attn", "cross_attn", deformable_attention()), *feed_forward,
        ("norms.0", "norm2", norm()), ("norms.1", "norm1", norm()), ("norms.2", "norm3", norm()),
    ]  # fmt: skip
    entries = torchvision_body("backbone")
    entries += projections(_neck("gn"), bias=False)
    for side, count, parts in (("encoder", ENCODER, encoder), ("decoder", DECODER, decoder)):
        for layer in range(count):
            name = f"{side}.layers.{layer}"
            for theirs, ours, block in parts:
                entries += module(f"{name}.{theirs}", f"transformer.{name}.{ours}", block)
    entries.append(("level_embed", "transformer.level_embed", (LEVELS, WIDTH)))
    embedded = {"plain": 2 * WIDTH, "refine": 2 * WIDTH, "dino": WIDTH}.get(variant)
    if embedded:
        entries.append(("query_embedding.weight", "query_embed.weight", (QUERIES, embedded)))
    if variant in ("two_stage", "dino"):
        entries += module("memory_trans_fc", "transformer.enc_output", linear(WIDTH, WIDTH))
        entries += module("memory_trans_norm", "transformer.enc_output_norm", norm())
    else:
        entries += module("reference_points_fc", "transformer.reference_points", linear(WIDTH, 2))
    if variant == "two_stage":
        pos_trans = linear(2 * WIDTH, 2 * WIDTH)
        entries += module("pos_trans_fc", "transformer.pos_trans", pos_trans)
        entries += module("pos_trans_norm", "transformer.pos_trans_norm", norm(2 * WIDTH))
    if variant == "dino":
        name = "decoder.ref_point_head"
        entries += module(name, f"transformer.{name}", perceptron(2 * WIDTH, WIDTH, WIDTH))
        entries += module("decoder.norm", "transformer.decoder.norm", norm())
        entries.append(
            ("dn_query_generator.label_embedding.weight", "recipes.denoising.label_enc.weight",
             (num_classes, WIDTH))
        )  # fmt: skip
    for head in range(DECODER + (variant in ("two_stage", "dino"))):
        entries += module(
            f"bbox_head.cls_branches.{head}", f"class_embed.{head}", linear(WIDTH, num_classes)
        )
        for place, outputs in ((0, WIDTH), (2, WIDTH), (4, 4)):  # activations lie between
            entries += module(
                f"bbox_head.reg_branches.{head}.{place}",
                f"bbox_embed.{head}.layers.{place // 2}",
                linear(WIDTH, outputs),
            )
    return entries


def _neck(norm_name: str) -> Callable[[int], tuple[str, str]]:
    def names(level: int) -> tuple[str, str]:
        place = f"neck.convs.{level}" if level < 3 else f"neck.extra_convs.{level - 3}"
        return f"{place}.conv", f"{place}.{norm_name}"

    return names
