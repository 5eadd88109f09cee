import json
import pkgutil
import subprocess
import sys

import llmcad_actors.core

MODULES = [f"llmcad_actors.core.{module.name}" for module in pkgutil.iter_modules(llmcad_actors.core.__path__)]

SCRIPT = f"""
import importlib, json, sys
for name in {MODULES!r}:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def test_the_core_pulls_in_nothing_but_numpy_the_standard_library_and_the_errors() -> None:
    assert len(MODULES) > 10
    output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(json.loads(output.stdout))
    assert set(MODULES) <= loaded
    allowed = {"llmcad_actors", "llmcad_actors.errors", "llmcad_actors.core", "numpy", *MODULES}
    ours = {name for name in loaded if name.startswith("llmcad_actors")}
    assert ours <= allowed
    for name in ("torch", "ray", "transformers", "tokenizers", "psutil", "yaml", "msgpack"):
        assert name not in loaded
    bare = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"numpy", "llmcad_actors"}
    assert not {name for name in bare if not name.startswith("_")}, bare
