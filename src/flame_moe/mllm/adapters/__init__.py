"""The two adapters, registered with PEFT; whoever imports from here is told which extra is missing, if it is."""

from __future__ import annotations

import importlib.util

from flame_moe.errors import ExtraMissingError

if importlib.util.find_spec("peft") is None or importlib.util.find_spec("transformers") is None:
    raise ExtraMissingError(
        "adapters of language models need the packages peft and transformers",
        mend="Install them with: pip install 'flame-moe[mllm]'",
    )

from flame_moe.mllm.adapters.registration import register

register()
