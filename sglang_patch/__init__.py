"""SGLang's attention backend ``etap``: DeepSeek-style models with ``--attention-backend etap``.

Registered through SGLang's plugin entry point (``sglang.srt.plugins``); SGLang itself is not
changed. ``etap-sglang-check`` says whether the installed versions will work, and
``python -m sglang_patch.run`` starts SGLang's tools that load no plugins themselves.
"""
