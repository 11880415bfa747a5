"""What a person starts: `morlaif <job>` = `python -m jobs <job>`. Thin: read the config, wire actors, own the loop."""
