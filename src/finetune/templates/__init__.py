"""Turns conversations into prompt text. Verb: render.

`find_template` -> `ChatTemplate.render` (training) and `ChatTemplate.render_prompt` (asking).
"""
