# Local and never committed: stands in until the editable install, which remembers that ggpass.ggd was this
# file, is made anew. The package directory beside it wins in every other install. Delete it then.
from pathlib import Path

_folder = Path(__file__).with_suffix("")
__path__ = [str(_folder)]
__package__ = __name__
__spec__.submodule_search_locations = __path__
__file__ = str(_folder / "__init__.py")
exec(compile(Path(__file__).read_text(encoding="utf-8"), __file__, "exec"))
