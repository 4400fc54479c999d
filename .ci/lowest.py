"""Print the lowest versions that pyproject.toml admits, as constraints for pip. `make oldest` installs torch itself."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
    for requirement in requirements:
        bound = re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", requirement)
        if bound and bound[1] != "torch":
            print(f"{bound[1]}=={bound[2]}")
