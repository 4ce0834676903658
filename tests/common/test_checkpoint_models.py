"""Models from checkpoint files, official and our own, and what is said about files that do not fit."""

import logging

import pytest
import pytorch_lightning as pl
import torch
from checkpoint_makers import autoencoder_config, biflownet_config, biflownet_file, generation_config, lightning_file
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder, load_autoencoder_weights
from AutoEncoder.model.autoencoder import Autoencoder
from common.checkpoint_files import load_checkpoint, newest_checkpoint
from common.errors import UserError
from ddpm.checkpoint import build_biflownet, load_biflownet, load_biflownet_weights
from train.autoencoder.training import build_autoencoder


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    model = build_autoencoder(autoencoder_config())
    model.codebook.N.fill_(2.0)  # as after training
    return model


@pytest.fixture(scope="module")
def biflownet():
    torch.manual_seed(0)
    return build_biflownet(biflownet_config())


def same_weights(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def without_discriminator(autoencoder) -> torch.nn.Module:
    """What is loaded of a trainable autoencoder to encode and decode."""
    plain = Autoencoder(autoencoder.cfg)
    names = plain.state_dict()
    plain.load_state_dict({name: value for name, value in autoencoder.state_dict().items() if name in names})
    return plain


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ autoencoder


@pytest.mark.parametrize("form", ["cfg", "bare", "plain"])
def test_official_autoencoder_file(tmp_path, autoencoder, form):
    """Official hyper_parameters: a DictConfig, itself or under `cfg`, without the keys that only we have."""
    cfg = OmegaConf.create(OmegaConf.to_container(autoencoder_config()))
    for section, ours in (("model", "adam_betas codebook_decay lr_schedule gradient_clip"), ("dataset", "split_seed")):
        for name in ours.split():
            del cfg[section][name]
    cfg.model.i3d_feat = False
    stored = {"cfg": {"cfg": cfg}, "bare": cfg, "plain": {"cfg": OmegaConf.to_container(cfg)}}[form]
    perceptual = {
        "weights": {"perceptual_loss.net.slice1.0.weight": torch.zeros(2), "perceptual_loss.lin0": torch.ones(1)}
    }
    path = lightning_file(tmp_path / "ae.ckpt", autoencoder, stored, hparams_type=DictConfig, **perceptual)
    model = load_autoencoder(path, downsample=4)
    assert same_weights(model, without_discriminator(autoencoder))
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert (model.downsample_factor, model.embedding_dim) == (4, 4)
    x = torch.randn(1, 1, 16, 20, 32)
    assert torch.equal(model.reconstruct(x), autoencoder.reconstruct(x))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_file_of_a_real_lightning_run(tmp_path):
    """What Lightning itself writes, callbacks, loops and optimisers included."""
    torch.manual_seed(0)
    model = build_autoencoder(autoencoder_config())
    batches = torch.utils.data.DataLoader([{"data": torch.randn(1, 16, 16, 16)} for _ in range(4)], batch_size=2)
    saving = ModelCheckpoint(
        tmp_path, filename="real", monitor="train/recon_loss", save_last=True, every_n_train_steps=2
    )
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[saving, LearningRateMonitor()],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)
    checkpoint = load_checkpoint(tmp_path / "real.ckpt")
    assert checkpoint["global_step"] == 2
    assert len(checkpoint["optimizer_states"]) == 2
    assert checkpoint["callbacks"]
    assert same_weights(load_autoencoder(tmp_path / "real.ckpt"), without_discriminator(model))
    assert newest_checkpoint(tmp_path) is not None


def test_weights_for_training_to_start_from(tmp_path, autoencoder):
    path = lightning_file(tmp_path / "ae.ckpt", autoencoder, {"cfg": autoencoder_config()})
    torch.manual_seed(1)
    model = build_autoencoder(autoencoder_config("model.stage=2"))
    assert not same_weights(model, autoencoder)
    load_autoencoder_weights(model, path)
    assert same_weights(model, autoencoder)
    wider = build_autoencoder(autoencoder_config("model.n_hiddens=16"))
    assert "do not fit the configured autoencoder (4x)" in message_of(load_autoencoder_weights, wider, path)


def other_config(path, autoencoder, *overrides, **unchecked):
    cfg = autoencoder_config(*overrides)
    cfg.model.update(unchecked)
    return lightning_file(path, autoencoder, {"cfg": cfg})


def without(path, autoencoder, *names):
    state = {name: value for name, value in autoencoder.state_dict().items() if name not in names}
    torch.save({"state_dict": state, "hyper_parameters": {"cfg": autoencoder_config()}}, path)


AUTOENCODER_ERRORS = [
    (
        lambda p, m: other_config(p, m, "model.embedding_dim=8"),
        r"the weights do not fit .*has shape .* \(and \d+ more\)",
    ),
    (
        lambda p, m: other_config(p, m, "dataset.image_channels=2"),
        r"encoder.conv_first.*shape \(8, 1, 3, 3, 3\), expected",
    ),
    (lambda p, m: other_config(p, m, "model.n_codes=16"), r"codebook.* has shape"),
    (lambda p, m: without(p, m, "pre_vq_conv.bias"), r"pre_vq_conv.bias is missing$"),
    (
        lambda p, m: lightning_file(p, m, {"cfg": autoencoder_config()}, weights={"x": torch.ones(1)}),
        r"x is not part of",
    ),
    (lambda p, m: lightning_file(p, m, {"lr": 1}), r"holds no autoencoder config"),
    (lambda p, m: lightning_file(p, m, None), r"holds no autoencoder config"),
    (lambda p, m: lightning_file(p, m, {"model": 3, "dataset": {}}), r"stored autoencoder config is damaged"),
    (
        lambda p, m: lightning_file(p, m, {"model": {"downsample": [4]}, "dataset": {}}),
        r"the stored autoencoder config is damaged: model.embedding_dim is missing",
    ),
    (lambda p, m: other_config(p, m, stage=7), r"autoencoder config: model.stage is 7"),
    (lambda p, m: other_config(p, m, n_hiddens="x"), r"the stored autoencoder config is damaged"),
    (lambda p, m: torch.save({"state_dict": {}}, p), r"no autoencoder checkpoint"),
    (lambda p, m: torch.save({"a": 1}, p), r"no autoencoder checkpoint"),
    (lambda p, m: without(p, m, "codebook.embeddings"), r"no autoencoder checkpoint"),
]


@pytest.mark.parametrize(("make", "message"), AUTOENCODER_ERRORS)
def test_autoencoder_files_that_do_not_fit(tmp_path, autoencoder, make, message):
    make(tmp_path / "ae.ckpt", autoencoder)
    with pytest.raises(UserError, match=rf"(ae\.ckpt: .*)?{message}"):
        load_autoencoder(tmp_path / "ae.ckpt")
    message_of(load_autoencoder, tmp_path / "ae.ckpt")


def test_4x_checkpoint_where_8x_is_needed(tmp_path, autoencoder):
    path = lightning_file(tmp_path / "ae.ckpt", autoencoder, {"cfg": autoencoder_config()})
    message = message_of(load_autoencoder, path, downsample=8)
    assert "ae.ckpt: this autoencoder compresses by 4x, 8x is needed here" in message


def test_kinds_of_checkpoint_are_told_apart(tmp_path, autoencoder, biflownet):
    ae = lightning_file(tmp_path / "ae.ckpt", autoencoder, {"cfg": autoencoder_config()})
    bf = biflownet_file(tmp_path / "bf.pt", biflownet)
    assert "bf.pt: a BiFlowNet checkpoint, expected an autoencoder" in message_of(load_autoencoder, bf)
    assert "ae.ckpt: an autoencoder checkpoint, expected a BiFlowNet" in message_of(
        load_biflownet_weights, biflownet, ae
    )
    assert "ae.ckpt: an autoencoder checkpoint" in message_of(load_biflownet, generation_config(), ae)


def test_config_that_the_model_refuses():
    cfg = autoencoder_config()
    OmegaConf.update(cfg, "model.downsample", [6, 6, 6])
    assert message_of(build_autoencoder, cfg).startswith("autoencoder config: ")


def test_fingerprint_follows_latents_alone(tmp_path, autoencoder):
    path = lightning_file(tmp_path / "ae.ckpt", autoencoder, {"cfg": autoencoder_config()})
    fingerprint = latent_fingerprint(autoencoder)
    assert len(fingerprint) == 64
    unchanged, changed = (
        ["decoder.", "post_vq_conv.", "volume_discriminator.", "codebook.N"],
        ["encoder.", "pre_vq_conv."],
    )
    for prefix in [*unchanged, *changed, "codebook.embeddings"]:
        model = build_autoencoder(autoencoder_config())
        load_autoencoder_weights(model, path)
        name = next(name for name in model.state_dict() if name.startswith(prefix))
        model.state_dict()[name].view(-1)[0] += 1
        assert (latent_fingerprint(model) == fingerprint) == (prefix in unchanged), name
    assert latent_fingerprint(load_autoencoder(path)) == fingerprint
    assert latent_fingerprint(load_autoencoder(path).to(torch.bfloat16)) != fingerprint


# -------------------------------------------------------------------------------------------------- BiFlowNet


@pytest.mark.parametrize("use_ema", [True, False])
def test_official_biflownet_file(tmp_path, biflownet, use_ema):
    path = biflownet_file(tmp_path / "bf.pt", biflownet)
    model = build_biflownet(biflownet_config())
    load_biflownet_weights(model, path, use_ema=use_ema)
    expected = {name: value + use_ema for name, value in biflownet.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_generation_model_is_ready_to_sample(tmp_path, biflownet):
    model = load_biflownet(generation_config(), biflownet_file(tmp_path / "bf.pt", biflownet))
    assert model.null_label is None
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(model.cond_emb.weight, biflownet.cond_emb.weight + 1)


def test_config_keys_reach_the_model():
    model = build_biflownet(biflownet_config("num_dit=2", "volume_channels=6", "label_dropout=0.1", "vq_size=32"))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert (model.channels, model.null_label, model.cond_emb.weight.shape) == (6, 3, (4, 24 * 4))
    assert (len(model.IntraPatchFlow_mid), model.IntraPatchFlow_mid[0].attn.num_heads, model.vq_size) == (2, 2, 32)
    attention = {name: shape for name, shape in shapes.items() if name.endswith("to_qkv.weight")}
    assert {shape[0] for shape in attention.values()} == {3 * 2 * 32}  # attn_heads of 32 channels
    assert {name.split(".")[1] for name in attention if name.startswith("downs")} == {"2"}  # use_attn 0 0 1
    assert model.x_embedder.proj.kernel_size == (2, 2, 2)


def test_null_label_is_read_off_the_file(tmp_path, biflownet, caplog):
    guided = build_biflownet(biflownet_config("label_dropout=0.1"))
    path = biflownet_file(tmp_path / "guided.pt", guided)
    model = load_biflownet(generation_config(), path)
    assert model.null_label == 3
    assert torch.equal(model.cond_emb.weight, guided.cond_emb.weight + 1)

    plain = build_biflownet(biflownet_config())
    load_biflownet_weights(plain, path)
    assert torch.equal(plain.cond_emb.weight, guided.cond_emb.weight[:3] + 1)

    null_row = guided.cond_emb.weight[3].clone()
    with caplog.at_level(logging.WARNING):
        load_biflownet_weights(guided, biflownet_file(tmp_path / "plain.pt", biflownet))
    assert "plain.pt has no null label" in caplog.text
    assert torch.equal(guided.cond_emb.weight[:3], biflownet.cond_emb.weight + 1)
    assert torch.equal(guided.cond_emb.weight[3], null_row)


BIFLOWNET_ERRORS = [
    (["volume_channels=8"], r"bf.pt: the weights do not fit .*trained with volume_channels=4.*: .*has shape"),
    (["num_classes=2"], r"cond_emb.weight has shape \(3, 96\), expected \(2, 96\)"),
    (["num_classes=4"], r"cond_emb.weight has shape \(3, 96\), expected \(4, 96\)"),
    (["patch_size=1"], r"pos_embed has shape \(1, 64, 24\), expected \(1, 512, 24\)"),
    (["num_dit=2"], r"IntraPatchFlow_mid.1\S+ is missing"),
    (["dim_mults=[1,1,2,2]", "use_attn=[0,0,1,1]"], r"is missing"),
]


@pytest.mark.parametrize(("overrides", "message"), BIFLOWNET_ERRORS)
def test_biflownet_files_that_do_not_fit(tmp_path, biflownet, overrides, message):
    path = biflownet_file(tmp_path / "bf.pt", biflownet)
    with pytest.raises(UserError, match=message):
        load_biflownet(generation_config(*overrides), path)
    with pytest.raises(UserError, match=message):
        load_biflownet_weights(build_biflownet(biflownet_config(*overrides)), path)


@pytest.mark.parametrize("content", [{"model": {}}, {"ema": {}}, {"ema": 3}, {}])
def test_files_without_biflownet_weights(tmp_path, biflownet, content):
    torch.save(content, tmp_path / "bf.pt")
    assert "no BiFlowNet checkpoint" in message_of(load_biflownet_weights, biflownet, tmp_path / "bf.pt")


def test_biflownet_config_that_the_model_refuses():
    assert message_of(build_biflownet, biflownet_config("resnet_groups=5")).startswith("BiFlowNet config: ")
