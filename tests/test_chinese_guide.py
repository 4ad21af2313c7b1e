"""docs/zh/from_mindspeed.md: its commands work, and everything that the guides name has a place that answers it.

Commands run in the order of the page on a model with the layers of Qwen2.5-VL-7B and tiny widths. What a command leaves
open is made small (`SMALLER`), numbers of steps, tokens and processes are reduced (`REDUCED`), and that is all.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import clips
import mindspeed_runs
import pytest
import tiny_run
from PIL import Image

from duetvl.cli import main
from duetvl.convert.cli import main as convert
from duetvl.migrate.key_tables import key_tables

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "zh" / "from_mindspeed.md"
PAGES = (ROOT / "docs" / "environment_variables.md", ROOT / "docs" / "zh" / "environment_variables.md")
NOT_RUN = (  # installation, the network; a server, which tests/serving starts; test_readme.py runs the doctor
    "duetvl doctor",
    "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
    'pip install -e ".[npu]"',
    'pip install -e ".[mindspore]"',
    "modelscope download --model Qwen/Qwen2.5-VL-7B-Instruct --local_dir ckpt/hf_path/Qwen2.5-VL-7B-Instruct",
    "duetvl serve ckpt/hf_path/Qwen2.5-VL-7B-Instruct --served-name qwen2_vl --port 1025",
)
SMALL_RUN = "--device cpu train.steps=1 train.global_batch=2 data.workers=0 log.plot=false log.tensorboard=false"
SMALL_ANSWER = "--device cpu --backend torch --cache-tokens 4096"
SMALL_QUESTIONS = f"{SMALL_ANSWER} --limit 2 --min-pixels 784 --max-pixels 3136 --max-new-tokens 2"
SMALLER = {  # what is added
    "duetvl train": f"{SMALL_RUN} --backend torch checkpoint.every=1",
    "bash launch": SMALL_RUN,
    "duetvl check": "train.output_dir=runs/checked",
    "duetvl infer": f"{SMALL_ANSWER} --max-new-tokens 4",
    "duetvl bench": SMALL_ANSWER,
    "duetvl eval": SMALL_QUESTIONS,
}
ONE_STAGE = "parallel.pp=1 parallel.vision_layers=null parallel.language_layers=null parallel.dp=1"
REDUCED = {
    "--resume @500 --device cpu train.steps=1": "--resume @1 --device cpu train.steps=2",
    "train.eval_every=500": "train.eval_every=1 data.val_max_samples=2",
    "--max-new-tokens 256": "",
    "--batch 1,4 --input-tokens 512 --output-tokens 256": "--batch 1,2 --input-tokens 96 --output-tokens 2",
    "--image-size 448": "--image-size 56",
    "NPROC=8 bash launch/torch_npu/train.sh run.yaml": "NPROC=2 bash launch/torch_npu/train.sh run.yaml parallel.dp=1",
    "NPROC=8 bash launch/mindspore/train.sh run.yaml": f"bash launch/mindspore/train.sh run.yaml {ONE_STAGE}",
}


def lines(page: Path) -> Iterator[str]:
    """The commands of the page's shell blocks."""
    for text in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield from filter(None, (line.strip() for line in text.replace("\\\n", " ").splitlines()))


def as_run(line: str) -> str:
    start = next((start for start in SMALLER if start in line), None)
    line = line if start is None else f"{line} {SMALLER[start]}"
    for words, fewer in REDUCED.items():
        line = line.replace(words, fewer)
    return line


def write_media(place: Path) -> None:
    """What the guides' users have downloaded: pictures, a video, LLaVA-Instruct, RLHF-V, benchmarks."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pictures, data = place / "data" / "COCO2017" / "train2017", place / "data"
    for folder in (pictures, data / "datasets" / "rlhf-v", data / "test_images"):
        folder.mkdir(parents=True)
    for name in (place / "demo.jpg", data / "test_images" / "a.jpg", *(pictures / f"{n}.jpg" for n in range(8))):
        Image.new("RGB", (56, 56), "red").save(name)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Red."}]
    talks = [{"id": str(n), "image": f"{n}.jpg", "conversations": turns} for n in range(8)]
    (data / "llava_instruct_150k.json").write_text(json.dumps(talks))
    words = json.dumps({"question": "What?", "chosen": "Red.", "rejected": "A cat."})
    picture = {"bytes": (place / "demo.jpg").read_bytes(), "path": "a.jpg"}
    rows = [{"image": picture, "text": words} for _ in range(4)]
    parquet.write_table(arrow.Table.from_pylist(rows), data / "datasets" / "rlhf-v" / "rlhf-v.parquet")
    clips.write_clip(place / "demo.mp4")
    shutil.copy(place / "demo.mp4", data / "demo.mp4")
    turns = [{"role": "user", "content": "<video>What happens?"}, {"role": "assistant", "content": "Nothing."}]
    (data / "mllm_video_demo.json").write_text(json.dumps([{"messages": turns, "videos": ["demo.mp4"]}] * 2))


def write_benchmarks(data: Path) -> None:
    """AI2D as VLMEvalKit has it, and TextVQA as MindIE's guide has it; two questions each."""
    from base64 import b64encode

    picture = b64encode((data.parent / "demo.jpg").read_bytes()).decode()
    head = "\t".join(("index", "image", "question", "A", "B", "answer"))
    rows = [f"{number}\t{picture}\tWhich colour?\tred\tblue\tA" for number in range(2)]
    (data / "AI2D_TEST.tsv").write_text("\n".join((head, *rows)) + "\n")
    folder = data / "textvqa"
    folder.mkdir()
    shutil.copy(data.parent / "demo.jpg", folder / "a.jpg")
    asked = {"image": "a.jpg", "question": "What is written?", "answer": "stop"}
    questions = [json.dumps({**asked, "question_id": number}) + "\n" for number in range(2)]
    (folder / "textvqa_val.jsonl").write_text("".join(questions))
    people = [{"answer": "stop", "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
    annotations = [{"image_id": "a", "question_id": number, "answers": people} for number in range(2)]
    (folder / "textvqa_val_annotations.json").write_text(json.dumps({"annotations": annotations}))


def write_mindspeed_files(place: Path) -> None:
    """The files of a MindSpeed-MM user for Qwen2.5-VL-7B."""
    guide = mindspeed_runs.GUIDES["qwen2_5_vl_7b"]
    content = mindspeed_runs.data_json(guide)
    content["dataset_param"]["basic_parameters"]["dataset"] = "./data/mllm_format_llava_instruct_data.json"
    (place / "data_7b.json").write_text(json.dumps(content))
    (place / "model_7b.json").write_text(json.dumps(mindspeed_runs.model_json(guide)))
    (place / "finetune_qwen2_5_vl_7b.sh").write_text(mindspeed_runs.script(guide))
    tokenizer = {"from_pretrained": "ckpt/hf_path/Qwen2.5-VL-7B-Instruct"}
    asked = {"prompts": "What is it?", "image_path": "demo.jpg", "pipeline_class": "Qwen2VlPipeline"}
    (place / "inference_qwen2_5_vl_7b.json").write_text(json.dumps({**asked, "tokenizer": tokenizer, "device": "npu"}))
    scored = {"dataset_path": "data/AI2D_TEST.tsv", "evaluation_dataset": "ai2d_test", "result_output_path": "outputs"}
    scored |= {"evaluation_model": "qwen2_vl_7b", "model_id": "Qwen2VlPipeline", "device": "npu"}
    (place / "evaluate_qwen2_5_vl_7b.json").write_text(json.dumps({**scored, "tokenizer": tokenizer}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the guide's reader works."""
    for framework in ("torch", "mindspore"):
        if find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
    place = tmp_path_factory.mktemp("guide")
    for name in ("recipes", "launch"):
        shutil.copytree(ROOT / name, place / name)
    (place / "duetvl").symlink_to(ROOT / "duetvl")
    vision = {**tiny_run.QWEN2_5["vision_config"], "depth": 32, "out_hidden_size": 128}  # type: ignore[dict-item]
    sizes = {"num_hidden_layers": 28, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
    models = place / "ckpt" / "hf_path"
    tiny_run.write_model(models / "Qwen2.5-VL-7B-Instruct", vision_config=vision, **sizes)
    (models / "Qwen2.5-VL-3B-Instruct").symlink_to("Qwen2.5-VL-7B-Instruct")
    write_media(place)
    write_benchmarks(place / "data")
    write_mindspeed_files(place)
    return place


def of_release_2_3_0(place: Path) -> None:
    """A checkpoint whose vision qkv has Hugging Face's order, as these releases wrote it."""
    words = ["Qwen2_5_VLConverter", "hf_to_mm", "--cfg.mm_dir", "ckpt/mm_path_2.3.0/Qwen2.5-VL-7B-Instruct"]
    words += ["--cfg.hf_config.hf_dir", "ckpt/hf_path/Qwen2.5-VL-7B-Instruct", "--cfg.vit_qkv_layout", "hf"]
    lists = ["--cfg.parallel_config.llm_pp_layers", "[[12,16]]", "--cfg.parallel_config.vit_pp_layers", "[[32,0]]"]
    assert convert([*words, *lists]) == 0


def run(line: str) -> None:
    program, *words = shlex.split(line)
    programs: dict[str, Callable[[list[str]], int]] = {"duetvl": main, "mm-convert": convert}
    assert programs[program](words) == 0, line


def launched(line: str, place: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", "-c", line], cwd=place, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_every_command_of_the_guide_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("DUETVL_BACKEND", raising=False)
    of_release_2_3_0(place)
    commands = list(lines(GUIDE))
    assert [line for line in NOT_RUN if line not in commands] == []
    launches = []  # frameworks are imported in them while the other commands run
    for line in map(as_run, filter(lambda line: line not in NOT_RUN, commands)):
        if "bash launch" in line:
            launches.append(launched(line, place))
        else:
            run(line)
    for process in launches:
        told = process.communicate(timeout=300)
        assert process.returncode == 0, told
    made = (
        "preview.png", "benchmark.csv", "captions.jsonl", "ckpt/merged/model.safetensors", "evals/ai2d/report.html",
        "evals/textvqa/mindie.csv", "outputs/qwen2_vl_7b_ai2d_test/scores.json", "runs/mindspore/metrics.jsonl",
        "save_dir/metrics.jsonl", "runs/qwen2_5_vl_7b_dpo_lora/export/adapter_config.json",
    )  # fmt: skip
    assert [path for path in made if not (place / path).exists()] == []
    rows = [json.loads(line) for line in (place / "runs" / "validated" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in row for row in rows)
    original = place / "ckpt/hf_path/Qwen2.5-VL-7B-Instruct"
    assert convert(["verify", str(original), str(place / "ckpt/mm_to_hf/from-2.3.0")]) == 0


# -- what the guides name ---------------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    return text.split()


VARIABLES = names("""
    ASCEND_RT_VISIBLE_DEVICES ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_GLOBAL_LOG_LEVEL ASCEND_LAUNCH_BLOCKING
    ACLNN_CACHE_LIMIT HCCL_CONNECT_TIMEOUT HCCL_EXEC_TIMEOUT HCCL_BUFFSIZE HCCL_DETERMINISTIC LCCL_DETERMINISTIC
    INF_NAN_MODE_ENABLE TASK_QUEUE_ENABLE COMBINED_ENABLE CPU_AFFINITY_CONF NPU_ASD_ENABLE PYTORCH_NPU_ALLOC_CONF
    MULTI_STREAM_MEMORY_REUSE CUDA_DEVICE_MAX_CONNECTIONS TOKENIZERS_PARALLELISM MS_DEV_HOST_BLOCKING_RUN
    MS_DEV_LAUNCH_BLOCKING LOCAL_WORLD_SIZE NPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT HOSTFILE WORLD_SIZE
    TP PP CP DP VP_SIZE MBS GRAD_ACC_STEP GBS LOAD_PATH SAVE_PATH LORA_PATH MM_DATA MM_MODEL MM_TOOL
    ATB_LLM_BENCHMARK_ENABLE ATB_LLM_BENCHMARK_FILEPATH ATB_OPERATION_EXECUTE_ASYNC ATB_LAUNCH_KERNEL_WITH_TILING
    ATB_LAYER_INTERNAL_TENSOR_REUSE ATB_WORKSPACE_MEM_ALLOC_GLOBAL ATB_CONVERT_NCHW_TO_ND ATB_CONTEXT_WORKSPACE_SIZE
    ATB_MATMUL_SHUFFLE_K_ENABLE ATB_LLM_LCOC_ENABLE MINDIE_LOG_TO_STDOUT MINDIE_LOG_TO_FILE MINDIE_LOG_LEVEL
    MODELTEST_DATASET_SPECIFIED llm_path
    model_path input_image input_text dataset_path max_batch_size max_input_length max_output_length
    shm_name_save_path
""")
KEYS = names("""
    dataset_type model_name_or_path use_fast_tokenizer split_special_tokens image_max_pixels image_min_pixels
    video_max_pixels video_min_pixels video_fps video_maxlen template dataset_dir dataset cache_dir train_on_prompt
    mask_history preprocessing_batch_size preprocessing_num_workers max_samples tool_format streaming overwrite_cache
    val_dataset val_max_samples val_rate packing neat_packing preprocess_on_fly cutoff_len formatting ranking system
    images videos messages role_tag content_tag user_tag assistant_tag observation_tag function_tag system_tag chosen
    rejected dataloader_mode drop_last sampler_type model_name ignore_pad_token_for_loss pin_memory shuffle
    model_id img_context_token_id vision_start_token_id image_token_id video_token_id freeze pipeline_num_layers
    canonical_model use_vit_dp recompute_granularity recompute_method recompute_num_layers use_remove_padding num_layers
    --use-mcore-models --tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size
    --context-parallel-algo --micro-batch-size --global-batch-size --tokenizer-type --vocab-size --seq-length
    --make-vocab-size-divisible-by --normalization --use-fused-rmsnorm --swiglu --use-fused-swiglu
    --no-masked-softmax-fusion --lr --lr-decay-style --weight-decay --train-iters --lr-warmup-fraction --clip-grad
    --adam-beta1 --adam-beta2 --no-gradient-accumulation-fusion --seed --bf16 --load --variable-seq-lengths
    --use-distributed-optimizer --reuse-fp32-param --use-flash-attn --no-load-optim --no-load-rng --no-save-optim
    --no-save-rng --num-workers --distributed-timeout-minutes --mm-data --mm-model --mm-tool --log-interval
    --save-interval --eval-interval --eval-iters --save --ckpt-format --log-tps --distributed-backend --ai-framework
    --lora-r --lora-alpha --lora-dropout --lora-target-modules --lora-apply-modules --load-base-model --dpo-beta
    --dpo-loss-type --dpo-label-smoothing --pref-ftx --ref-model --sequence-parallel --unaligned-linear
    --virtual-pipeline-model-parallel-size --enable-dummy-optimizer --calculate-per-sample-loss
    --calculate-per-token-loss --use-torch-fsdp2 --fsdp2-config-path --untie-embeddings-and-output-weights
    --init-model-with-meta-device --allow-internal-format --calculate-square-loss --downcast-to-bf16
    --encoder-dp-balance --hetero-parallel --jit-compile --lora-mixed-training --lora-register-forward-hook --lr-mult
    --max-seq-len --no-initialization --optimizer --profile-stage --recompute-skip-core-attention --trust-remote-code
    --use-cpu-initialization --use-data-balance --use-deter-comp --use-txt-dynamic-batching
    --weight-decay-exclude-modules pipeline_class hub_backend autotokenizer_name from_pretrained tokenizer_type
    is_encoder_decoder min_pixels max_pixels image_path video_path prompts device dtype do_sample temperature
    max_new_tokens top_k top_p repetition_penalty eos_token_id pad_token_id bos_token_id split_batch dataset_path
    evaluation_dataset evaluation_model result_output_path use_custom_prompt
""")


@pytest.mark.parametrize("page", PAGES, ids=("english", "chinese"))
def test_every_variable_of_the_guides_has_a_row(page: Path) -> None:
    rows = [line.split("|")[1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert [name for name in VARIABLES if name not in named] == []


def test_both_pages_of_variables_have_the_same_rows() -> None:
    english, chinese = (
        [re.findall(r"`(\w+)`", line.split("|")[1]) for line in page.read_text().splitlines() if line.startswith("| `")]
        for page in PAGES
    )
    assert english == chinese


def test_every_key_of_the_guides_has_a_row() -> None:
    """docs/migrating_keys.md is this text (tests/training/test_import_mindspeed.py)."""
    keys = {
        name for line in key_tables().splitlines() for name in re.findall(r"`([\w.*-]+)`", line.partition(" | ")[0])
    }
    last = {key.rpartition(".")[2] for key in keys}
    assert [key for key in KEYS if key not in last] == []
