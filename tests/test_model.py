"""The model is on loan: as it was afterwards, out of reach meanwhile, never run where the result would be wrong."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    FAMILIES,
    POSITIONS,
    VOCABULARY,
    batching,
    engine_threads,
    generate_alone,
    greedy,
    new_model,
    random_model,
    random_prompts,
    reference,
    shared_model,
)
from transformers import ContinuousBatchingConfig, PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig


PATIENCE = 30
PROMPT = [5, 6, 7, 8]
LONG = 400
NOTHING_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def batch(
    model: PreTrainedModel, prompts: list[list[int]] | None = None, limit: int = 6, **kwargs: Any
) -> list[list[int]]:
    kwargs.setdefault("async_batching", True)
    outputs = model.generate_batch(prompts or [PROMPT], generation_config=greedy(limit), **kwargs)
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs.values()]


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.tensor(random_prompts(1, shortest=40, longest=40))
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that hangs on the modules; what is mutable by identity, and the contents of the configs."""
    state: dict[str, Any] = {"config": copy.deepcopy(model.config.to_dict()), "class": type(model)}
    state["attention"] = model.config._attn_implementation
    for name, module in model.named_modules():
        state[f"{name}.training"] = module.training
        state[f"{name}.attributes"] = {k: id(v) for k, v in vars(module).items() if k != "training"}
        state[f"{name}.forward"] = module.forward.__func__ if hasattr(module.forward, "__func__") else module.forward
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
            state[f"{name}.{kind}"] = list(getattr(module, kind).values())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"{name}.storage"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor._version)
    return state


@pytest.fixture
def model() -> PreTrainedModel:
    """A Llama of the test's own, like the shared one."""
    return new_model("llama")


class TestTheModelIsAsBefore:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_after_a_call(self, family: str) -> None:
        model = new_model(family)
        model.model.layers[0].register_forward_hook(lambda *_: None) if family != "gpt2" else None
        before = state_of(model)
        batch(model, random_prompts(5, longest=30))
        assert state_of(model) == before

    def test_after_a_call_with_a_persistent_manager_but_for_the_manager(self, model) -> None:
        before = state_of(model)
        batch(model, persistent_manager=True)
        during = state_of(model)
        assert during[".attributes"].pop("_async_batching_manager")
        assert during == before
        model.destroy_cached_continuous_batching_manager()
        assert state_of(model) == before

    def test_after_a_refusal(self, model) -> None:
        before = state_of(model)
        with pytest.raises(ValueError):
            batch(model, [[]])
        with pytest.raises(ValueError):
            batch(model, continuous_batching_config=ContinuousBatchingConfig(num_blocks=0))
        assert state_of(model) == before

    def test_after_a_model_that_does_not_fit_was_refused(self) -> None:
        model = build("BloomForCausalLM", n_layer=2, n_head=4, hidden_size=64)
        before = state_of(model)
        with pytest.raises(ValueError):
            batch(model, async_batching=AsyncBatchingConfig(sequential_fallback=False))
        assert state_of(model) == before

    def test_after_it_ran_one_sequence_at_a_time(self) -> None:
        model = build("BloomForCausalLM", n_layer=2, n_head=4, hidden_size=64).train()
        before = state_of(model)
        batch(model, random_prompts(5, longest=30))
        assert state_of(model) == before

    def test_after_an_exception(self, model) -> None:
        before = state_of(model)
        with (
            pytest.raises(KeyError),
            model.continuous_batching_context_manager(greedy(LONG), async_batching=True) as manager,
        ):
            manager.add_request(PROMPT)
            raise KeyError
        assert state_of(model) == before

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_in_its_attention(self, model, attention: str) -> None:
        model.set_attn_implementation(attention)
        before = state_of(model)
        assert batch(model) == [reference(shared_model("llama"), PROMPT, greedy(6))]
        assert state_of(model) == before
        assert model.config._attn_implementation == attention

    def test_in_its_config_objects(self, model) -> None:
        configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
        batch(model)
        assert all(module.config is configs[name] for name, module in model.named_modules() if name in configs)
        assert model.model.config is model.config

    def test_in_the_training_flag_of_each_module(self, model) -> None:
        rng = random.Random(0)
        for module in model.modules():
            module.training = rng.random() < 0.5
        flags = {name: module.training for name, module in model.named_modules()}
        assert len(set(flags.values())) == 2
        assert batch(model) == [reference(shared_model("llama"), PROMPT, greedy(6))]
        assert {name: module.training for name, module in model.named_modules()} == flags

    def test_and_dropout_of_a_model_in_training_is_off_meanwhile(self) -> None:
        model = new_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
        expected = [generate_alone(model, PROMPT, greedy(6))]
        model.train()
        assert batch(model) == expected
        assert all(module.training for module in model.modules())

    def test_in_what_requires_gradients(self, model) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp" in name)
        needs = {name: p.requires_grad for name, p in model.named_parameters()}
        batch(model)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == needs

    def test_in_its_hooks_which_run_meanwhile(self, model) -> None:
        calls: list[int] = []
        handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        batch(model, limit=5)
        assert len(calls) >= 5
        handle.remove()
        assert batch(model) == [reference(shared_model("llama"), PROMPT, greedy(6))]

    def test_in_what_it_computes(self, any_model) -> None:
        model = copy.deepcopy(any_model)
        ids = torch.tensor(random_prompts(2, shortest=30, longest=30))
        with torch.no_grad():
            before = model(ids).logits
            batch(model)
            assert torch.equal(model(ids).logits, before)

    def test_and_can_be_saved_and_copied(self, model, tmp_path) -> None:
        batch(model)
        model.save_pretrained(tmp_path)
        assert "async_batching" not in (tmp_path / "config.json").read_text()
        again = type(model).from_pretrained(tmp_path)
        assert generate_alone(again, PROMPT, greedy(6)) == reference(shared_model("llama"), PROMPT, greedy(6))
        assert batch(copy.deepcopy(model)) == batch(model)


class TestTraining:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_gradients_afterwards_are_those_of_an_untouched_twin(self, family: str) -> None:
        model, twin = new_model(family).train(), new_model(family).train()
        for _ in range(2):
            batch(model, random_prompts(3, longest=30))
        torch.manual_seed(0)
        mine = gradients(model)
        torch.manual_seed(0)
        its = gradients(twin)
        assert mine.keys() == its.keys()
        assert len(mine) == len(list(model.parameters()))
        for name in mine:
            assert torch.equal(mine[name], its[name]), name

    def test_steps_in_between_take_effect_in_the_next_call(self, model) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        answers = []
        for _ in range(3):
            answers.append(batch(model, limit=12))
            assert answers[-1] == [generate_alone(model, PROMPT, greedy(12))]
            gradients(model)
            optimizer.step()
        assert answers[0] != answers[-1]

    def test_no_gradient_is_recorded_by_generating(self, model) -> None:
        batch(model)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_weights_moved_to_other_storage_are_found(self, model) -> None:
        batch(model, persistent_manager=True)
        other = new_model("llama", seed=3)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data = theirs.data.clone()
        expected = [generate_alone(other, PROMPT, greedy(6))]
        assert batch(model, persistent_manager=True) == expected
        model.destroy_cached_continuous_batching_manager()


class TestMeanwhile:
    def test_a_second_model_of_the_same_config_object_goes_on_as_before(self, model) -> None:
        twin = type(model)(model.config).eval()
        twin.load_state_dict(model.state_dict())
        assert twin.config is model.config
        expected = reference(shared_model("llama"), PROMPT, greedy(6))
        with model.continuous_batching_context_manager(greedy(LONG), async_batching=True) as manager:
            request_id = manager.add_request(PROMPT)
            assert generate_alone(twin, PROMPT, greedy(6)) == expected
            assert batch(twin) == [expected], "and can be batched at the same time"
            assert manager.is_running()
            output = manager.get_result(request_id, PATIENCE)
        assert output.generated_tokens[:6] == expected
        assert generate_alone(twin, PROMPT, greedy(6)) == expected

    def test_calling_the_model_is_refused(self, model) -> None:
        ids, errors = torch.tensor([PROMPT]), []

        def call(work: Callable[[], Any]) -> None:
            try:
                work()
            except Exception as error:
                errors.append(error)

        with model.continuous_batching_context_manager(greedy(LONG), async_batching=True) as manager:
            request_id = manager.add_request(PROMPT)
            for work in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=2)):
                for _ in range(10):
                    thread = threading.Thread(target=call, args=(work,))
                    thread.start()
                    thread.join()
                    call(work)
            assert manager.is_running(), "the calls came meanwhile"
            output = manager.get_result(request_id, PATIENCE)
        assert len(errors) == 40
        for error in errors:
            assert type(error) is RuntimeError
            assert "generating with async_batching" in str(error)
            assert "stop the manager" in str(error)
        assert output.generated_tokens == reference(shared_model("llama"), PROMPT, greedy(LONG))

    @pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
    def test_copying_the_model_is_refused_but_in_a_pause(self, model, copied: Callable) -> None:
        with model.continuous_batching_context_manager(greedy(3), async_batching=True) as manager:
            with pytest.raises(RuntimeError, match=r"cannot be copied or pickled meanwhile: .*manager\.pause"):
                copied(model)
            with manager.pause():
                copied(model)

    def test_a_second_manager_is_refused(self, model) -> None:
        with model.continuous_batching_context_manager(greedy(100), async_batching=True) as manager:
            request_id = manager.add_request(PROMPT)
            with pytest.raises(RuntimeError, match="generating already"):
                batch(model)
            second = model.init_continuous_batching(greedy(3), async_batching=True)
            with pytest.raises(RuntimeError, match="generating already"):
                second.start()
            second.destroy()
            output = manager.get_result(request_id, PATIENCE)
        assert output.generated_tokens == reference(shared_model("llama"), PROMPT, greedy(100))
        assert batch(model) == [reference(shared_model("llama"), PROMPT, greedy(6))]

    def test_two_models_run_side_by_side(self) -> None:
        models = [new_model(family) for family in FAMILIES]
        prompts = random_prompts(10, longest=40)
        managers = [model.init_continuous_batching(greedy(20), async_batching=True) for model in models]
        for manager in managers:
            manager.add_requests(prompts)
            manager.start()
        for manager in managers:
            manager.stop()
        for family, manager in zip(FAMILIES, managers, strict=True):
            found = {output.request_id: output.generated_tokens for output in manager}
            assert [found[f"req_{i}"] for i in range(10)] == [
                reference(shared_model(family), prompt, greedy(20)) for prompt in prompts
            ]


def build(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    return random_model(name, seed=seed, **{"vocab_size": VOCABULARY, **NOTHING_SPECIAL, **settings})


_USUAL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
_DECODER_OF_TWO = {
    "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_layers": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "max_position_embeddings": POSITIONS, "pad_token_id": 0,
}  # fmt: skip
_BERT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "is_decoder": True,
    "max_position_embeddings": POSITIONS, "pad_token_id": 0,
}  # fmt: skip

_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

# Attention that is more than causal or in windows: capped scores, sinks, chunks (and a temperature by positions that
# the model counts itself), values of other dimensions than keys, modules that attend twice.
_CAPPED = (  # eager, because the SDPA attention of transformers 5.17 leaves scores uncapped
    "Gemma2ForCausalLM",
    _USUAL | {"head_dim": 16, "attn_logit_softcapping": 5.0, "sliding_window": 8, "attn_implementation": "eager"},
)
_SINKS = ("GptOssForCausalLM", _USUAL | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 8})
_CHUNKED = (
    "Llama4ForCausalLM",
    _USUAL
    | {
        "head_dim": 16,
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 96,
        "num_hidden_layers": 4,
        "floor_scale": 4,
    },
)
_TWICE = ("DiffLlamaForCausalLM", _USUAL)  # fmt: skip
_SHARED = ("Gemma3nForCausalLM", _USUAL | {
    "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6, "num_kv_shared_layers": 2, "altup_num_inputs": 2,
    "laurel_rank": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "activation_sparsity_pattern": [0.0] * 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
})  # fmt: skip

# Each is expected to run, and to answer what `generate` does.
RUNS = [
    _CAPPED,
    _SINKS,
    _CHUNKED,
    _TWICE,
    _SHARED,
    ("DeepseekV3ForCausalLM", _USUAL | _LATENT),
    ("HrmTextForCausalLM", _USUAL),
    ("LlamaForCausalLM", _USUAL | {"max_position_embeddings": 64, "rope_parameters": _DYNAMIC}),
    ("GemmaForCausalLM", _USUAL | {"head_dim": 16}),
    ("Gemma2ForCausalLM", _USUAL | {"head_dim": 16, "attn_logit_softcapping": None, "sliding_window": 8}),
    ("Gemma3ForCausalLM", _USUAL | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7}),
    ("PhiForCausalLM", _USUAL),
    ("Phi3ForCausalLM", _USUAL | {"pad_token_id": 0, "sliding_window": 8}),
    ("OPTForCausalLM", {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    ("GPTNeoXForCausalLM", _USUAL),
    ("StableLmForCausalLM", _USUAL),
    ("CohereForCausalLM", _USUAL),
    ("Cohere2ForCausalLM", _USUAL | {"sliding_window": 8, "num_hidden_layers": 4}),
    ("OlmoForCausalLM", _USUAL),
    ("Olmo2ForCausalLM", _USUAL),
    ("Starcoder2ForCausalLM", _USUAL | {"sliding_window": 8}),
    ("Qwen2ForCausalLM", _USUAL | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8,
                                   "max_window_layers": 2}),
    ("GraniteForCausalLM", _USUAL | {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 3.0}),
    ("SmolLM3ForCausalLM", _USUAL | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "pad_token_id": 0}),
    ("GPTBigCodeForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
    ("NemotronForCausalLM", _USUAL | {"head_dim": 16}),
    ("BertLMHeadModel", _BERT),
    ("LlamaForCausalLM", _USUAL | {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 24}),
]  # fmt: skip
# Each runs and is right, or is refused in a sentence.
RUNS_OR_IS_REFUSED = [
    ("BloomForCausalLM", {"n_layer": 2, "n_head": 4, "hidden_size": 64}),
    ("MptForCausalLM", {"n_layers": 2, "n_heads": 4, "d_model": 64, "max_seq_len": POSITIONS}),
    ("FalconForCausalLM", _USUAL | {"alibi": True, "new_decoder_architecture": False}),
    ("FalconForCausalLM", _USUAL | {"alibi": False}),
    ("MambaForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    ("Mamba2ForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 16,
                           "n_groups": 1, "chunk_size": 8}),
    ("FalconH1ForCausalLM", _USUAL | {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1,
                                      "mamba_d_state": 8, "mamba_chunk_size": 8}),
    ("JambaForCausalLM", _USUAL | {"num_hidden_layers": 8, "mamba_d_state": 8, "num_experts": 2}),
    ("Lfm2ForCausalLM", _USUAL | {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
    ("RecurrentGemmaForCausalLM", _USUAL | {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8}),
    ("GPTJForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 8}),
    ("GPTNeoForCausalLM", {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 8,
                           "attention_types": [[["global", "local"], 1]], "max_position_embeddings": POSITIONS}),
    ("CodeGenForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 8}),
    ("CTRLLMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "dff": 96}),
    ("OpenAIGPTLMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
    ("XLNetLMHeadModel", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96}),
    ("BartForCausalLM", _DECODER_OF_TWO),
    ("MBartForCausalLM", _DECODER_OF_TWO),
    ("PegasusForCausalLM", _DECODER_OF_TWO),
    ("MarianForCausalLM", _DECODER_OF_TWO | {"decoder_start_token_id": 0}),
    ("BlenderbotForCausalLM", _DECODER_OF_TWO),
    ("PLBartForCausalLM", _DECODER_OF_TWO),
    ("MoshiForCausalLM", _USUAL | {"sliding_window": 8, "ffn_dim": 96, "pad_token_id": 0}),
    ("PaliGemmaForConditionalGeneration", {"text_config": _USUAL | {"model_type": "gemma", "vocab_size": VOCABULARY,
                                                                    "head_dim": 16, "eos_token_id": None},
                                           "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32,
                                                             "intermediate_size": 32, "num_hidden_layers": 1,
                                                             "num_attention_heads": 2, "image_size": 28,
                                                             "patch_size": 14},
                                           "image_token_index": 1000, "projection_dim": 64}),
    ("DeepseekV32ForCausalLM", _USUAL | _LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}),
    ("TrOCRForCausalLM", _DECODER_OF_TWO),
    ("XGLMForCausalLM", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "pad_token_id": 0}),
    ("BioGptForCausalLM", _USUAL | {"pad_token_id": 1}),
    ("RobertaForCausalLM", _BERT),
    ("BertLMHeadModel", _BERT | {"is_decoder": False}),
    ("ElectraForCausalLM", _BERT | {"embedding_size": 64}),
    ("MixtralForCausalLM", _USUAL | {"num_local_experts": 4, "sliding_window": 8}),
    ("Qwen3MoeForCausalLM", _USUAL | _MOE | {"head_dim": 16}),
    ("ModernBertDecoderForCausalLM", _USUAL | {"local_attention": 16, "pad_token_id": 0, "bos_token_id": 1,
                                               "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}),
    ("PersimmonForCausalLM", _USUAL),
    ("Exaone4ForCausalLM", _USUAL | {"sliding_window": 8, "num_hidden_layers": 4, "sliding_window_pattern": 4}),
    ("Olmo3ForCausalLM", _USUAL | {"sliding_window": 8, "num_hidden_layers": 4, "pad_token_id": 0}),
]  # fmt: skip


def case(name: str, settings: dict[str, Any]) -> Any:
    extra = [f"{key}={settings[key]}" for key in ("alibi", "attn_logit_softcapping", "is_decoder") if key in settings]
    extra += [settings["rope_parameters"]["rope_type"]] if "rope_parameters" in settings else []
    return pytest.param(name, settings, id="-".join([name, *extra]))


@pytest.fixture
def quiet() -> Iterator[None]:
    """Some of these models have much to say about their tiny configs."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.usefixtures("quiet")
class TestArchitectures:
    """Prompts longer than any window or chunk, split over several steps, beside one another."""

    PROMPTS = random_prompts(1, longest=3) + random_prompts(4, shortest=11, longest=40, seed=3)

    def answers(self, model: PreTrainedModel, new_tokens: int = 10) -> list[list[int]]:
        answers = [generate_alone(model, prompt, greedy(new_tokens)) for prompt in self.PROMPTS]
        assert len({tuple(answer) for answer in answers}) > 1, "the model cannot tell its prompts apart"
        return answers

    def found(self, model: PreTrainedModel, sequential_fallback: bool = False) -> list[list[int]]:
        return batch(
            model, self.PROMPTS, 10,
            continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=20),
            async_batching=AsyncBatchingConfig(debug=True, sequential_fallback=sequential_fallback),
        )  # fmt: skip

    def check(self, model: PreTrainedModel, found: list[list[int]], answers: list[list[int]]) -> None:
        """The same tokens, up to where two of them have the same logit but for rounding."""
        for prompt, mine, its in zip(self.PROMPTS, found, answers, strict=True):
            if mine != its:
                first = next(i for i, (a, b) in enumerate(zip(mine, its, strict=True)) if a != b)
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + its[:first]])).logits[0, -1]
                assert abs(logits[mine[first]] - logits[its[first]]) < 1e-4 * logits.std(), (mine, its)

    @pytest.mark.parametrize("name, settings", [case(*one) for one in RUNS])
    def test_that_are_supported_answer_what_generate_does(self, name: str, settings: dict[str, Any]) -> None:
        model = build(name, **settings)
        answers = self.answers(model)
        self.check(model, self.found(model), answers)

    @pytest.mark.parametrize("name, settings", [case(*one) for one in RUNS_OR_IS_REFUSED])
    def test_are_never_silently_wrong(self, name: str, settings: dict[str, Any]) -> None:
        model = build(name, **settings)
        answers = self.answers(model)
        try:
            found = self.found(model, sequential_fallback=True)
        except ValueError as refusal:
            assert name in str(refusal)
            assert "async_batching" in str(refusal)
            assert engine_threads() == []
            assert [generate_alone(model, p, greedy(10)) for p in self.PROMPTS] == answers
        else:
            self.check(model, found, answers)
        assert model.config._attn_implementation != "async_batching"

    @pytest.mark.parametrize("name, settings", [case(*one) for one in (_CAPPED, _SINKS, _CHUNKED, _TWICE)])
    @pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
    def test_of_unusual_attention_go_on_after_a_preemption(
        self, name: str, settings: dict[str, Any], overlap: bool
    ) -> None:
        model = build(name, **settings)
        answers = self.answers(model, 30)
        manager = model.init_continuous_batching(
            greedy(30),
            continuous_batching_config=batching(num_blocks=60, page_size=1, max_batch_tokens=20),
            async_batching=AsyncBatchingConfig(debug=True, overlap=overlap),
        )
        request_ids = manager.add_requests(self.PROMPTS)
        manager.start()
        found = {output.request_id: output.generated_tokens for output in (manager.get_result() for _ in request_ids)}
        engine = manager._engine
        manager.stop()
        self.check(model, [found[request_id] for request_id in request_ids], answers)
        assert engine.scheduler.preemptions > 0

    def test_whose_layers_share_keys_and_values_keep_them_once(self) -> None:
        model = build(_SHARED[0], **_SHARED[1])
        manager = model.init_continuous_batching(greedy(3), async_batching=True)
        manager.warmup()
        layers = manager._engine.runner.layers
        manager.destroy()
        own = {(layer.group, layer.key_pages.data_ptr()) for layer in layers.values()}
        assert len(layers) == 6
        assert len(own) == 4

    def test_that_count_positions_by_the_place_in_a_batch_are_refused(self, model) -> None:
        rotary = model.model.rotary_emb
        forward = rotary.forward
        rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1], device=x.device)[None])
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .* counts positions itself"):
            batch(model, async_batching=AsyncBatchingConfig(sequential_fallback=False))

    def test_with_frequencies_that_change_with_the_length_answer_up_to_there(self) -> None:
        model = build(
            "Phi3ForCausalLM", **_USUAL, pad_token_id=0, original_max_position_embeddings=64, rope_parameters=_LONGROPE
        )
        answers = self.answers(model)
        self.check(model, self.found(model), answers)
        prompt = random_prompts(1, shortest=56, longest=56)[0]
        output = model.generate_batch([prompt], generation_config=greedy(20), async_batching=True)["req_0"]
        assert output.generated_tokens == generate_alone(model, prompt, greedy(9))
        assert "reached the longest sequence there is room for, 64 positions" in output.error
        with pytest.raises(ValueError, match="65 tokens, more than the 64 positions up to which the model's rotary"):
            batch(model, [prompt + prompt[:9]])

    def test_without_a_language_head_are_refused(self, model) -> None:
        with pytest.raises((ValueError, AttributeError), match="LlamaModel"):
            batch(model.model)
