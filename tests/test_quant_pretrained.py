"""save_pretrained and from_pretrained of quantized transformers models: bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
from quant_models import gpt2, llama, states_equal

import fastllm
from fastllm.quant import Config, QuantLinear, convert_qat, prepare_qat

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.quantizers.auto")
IDS = torch.tensor([[1, 7, 3, 9, 2]])

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
CONFIGS = {
    "int8": "int8_weight",
    "int8-dynamic": "int8",
    "int4": "int4",
    "int4_asym": "int4_asym_g32",
    "nf4_double": "nf4_double",
    "fp8": "fp8",
    "mxfp8": "mxfp8",
    "head": Config("int8", head=True),
    "static": Config("int8", "int8_static"),
    "threshold": Config("int8", "int8", outlier_threshold=0.5),
    "outliers": Config("int8", "int8", outliers=1.5),
    "smooth": Config("int8", "int8", smooth=0.5),
    "awq": Config("int4_asym_g32", method="awq"),
}


def quantize(model, config, **options):
    calls = [{"input_ids": IDS}] if getattr(config, "needs_data", False) else None
    return fastllm.quantize(model, config, calibrate=calls, min_weights=0, **options)


def round_trip(model, folder, kind=transformers.AutoModelForCausalLM, **options):
    """Saves, loads, and checks that nothing is missing, left over, or of another dtype."""
    model.save_pretrained(folder)
    loaded, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return loaded


def case(name):
    """The formats in bfloat16, which they are made for, what rounds activations in float32."""
    dynamic = isinstance(CONFIGS[name], Config) or name == "int8-dynamic"
    return pytest.param(name, FP32 if dynamic else BF16, id=name)


@pytest.mark.parametrize(
    "name, dtype", [*map(case, CONFIGS), ("int4_asym", FP16), ("nf4_double", FP32)]
)
def test_the_same_bits_come_back(name, dtype, tmp_path):
    model = llama(tied=name in ("int8", "int4", "head"), attention_bias=name == "outliers")
    for parameter in model.parameters():  # `.to` would round the rotary frequencies, too
        parameter.data = parameter.data.to(dtype)
    quantize(model, CONFIGS[name])
    loaded = round_trip(model, tmp_path)
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == 14 + (name == "head")
    assert states_equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    one, other = model.model.layers[0].mlp.up_proj, loaded.model.layers[0].mlp.up_proj
    assert (other.format, other.threshold) == (one.format, one.threshold)
    assert other.weight.dtype == dtype and torch.equal(other.weight.data, one.weight.data)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == (name in ("int8", "int4"))


def test_what_was_loaded_is_saved_again(tmp_path):
    model = llama()
    quantize(model, "int4", exclude="*.mlp.*")
    quantize(model, "int8", include="*.mlp.*")  # two configs in one model
    once = round_trip(model, tmp_path / "one")
    twice = round_trip(once, tmp_path / "two")
    assert torch.equal(twice(IDS).logits, model(IDS).logits)
    report = fastllm.quantize(twice, "int4", min_weights=0).report()
    assert {row.reason for row in report.left} >= {"already quantized"} and not report.quantized
    noted = [m.config.quantization_config.to_dict() for m in (model, once, twice)]
    assert noted[0] == noted[1] == noted[2]


def test_conv1d_and_a_headless_class(tmp_path):
    model = gpt2()
    quantize(model, Config("int8", head=True))
    assert torch.equal(round_trip(model, tmp_path)(IDS).logits, model(IDS).logits)
    model = llama()
    quantize(model, "int8")
    model.save_pretrained(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_layers_that_stay_float32_in_a_half_model(tmp_path):
    """T5 keeps `wo` in float32, and asks it for its dtype."""
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "float")
    kind = transformers.T5ForConditionalGeneration
    model = kind.from_pretrained(tmp_path / "float", dtype=torch.float16)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    quantize(model, "nf4_double")
    loaded = round_trip(model, tmp_path / "codes", kind)
    assert states_equal(loaded.state_dict(), model.state_dict())
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_another_dtype_leaves_the_codes(tmp_path):
    model = llama()
    quantize(model, "fp8")
    loaded = round_trip(model, tmp_path, dtype=torch.bfloat16)
    one, other = model.model.layers[1].mlp.up_proj, loaded.model.layers[1].mlp.up_proj
    assert other.codes.dtype == torch.float8_e4m3fn and other.scales.dtype == torch.float32
    assert torch.equal(other.scales, one.scales) and other.weight.dtype == torch.bfloat16
    assert loaded(IDS).logits.dtype == torch.bfloat16


def test_qat_ends_in_a_model_that_is_saved(tmp_path):
    model = llama()
    prepare_qat(model, "int4", min_weights=0)
    convert_qat(model)
    assert torch.equal(round_trip(model, tmp_path)(IDS).logits, model(IDS).logits)


def test_restoring_takes_the_note_away(tmp_path):
    model = llama()
    before = model.config.to_dict()
    with quantize(model, "int8", include="*.mlp.*"):
        handle = quantize(model, "int4")
        assert len(model.config.quantization_config.layers) == 14
        handle.restore()
        assert len(model.config.quantization_config.layers) == 6
    assert model.config.to_dict() == before and not hasattr(model.config, "quantization_config")
    assert torch.equal(round_trip(model, tmp_path)(IDS).logits, model(IDS).logits)


def test_codes_of_another_format_are_refused(tmp_path):
    model = llama()
    quantize(model, "nf4")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for spec in config["quantization_config"]["layers"].values():
        spec["format"] = "fp4_g64"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected codes of fp4_g64 .*, found nf4_g64"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_importing_after_transformers_registers():
    code = (
        "import sys, transformers, fastllm\n"
        "auto = sys.modules['transformers.quantizers.auto']\n"
        "assert 'fastllm' in auto.AUTO_QUANTIZER_MAPPING\n"
        "assert 'fastllm' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "fastllm.quant.register_transformers()"  # once more does no harm
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_fastllm_transformers_says_so(tmp_path, monkeypatch):
    model = llama()
    quantize(model, "int8")
    model.save_pretrained(tmp_path)
    auto = sys.modules["transformers.quantizers.auto"]
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "fastllm")
    warned = []
    monkeypatch.setattr(auto.logger, "warning", warned.append)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "Unknown quantization type, got fastllm" in warned[0]
    assert "model.layers.0.mlp.up_proj.weight" in info["missing_keys"]
