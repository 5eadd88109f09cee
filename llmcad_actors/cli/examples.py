"""Two examples for the help of each main command."""

EXAMPLES = {
    "llmcad": (
        "llmcad demo",
        'llmcad generate --target ./Llama-2-13b --draft ./TinyLlama --memory 4GB "Once upon a time"',
    ),
    "generate": (
        "llmcad generate 'def read_lines(path):' --max-new-tokens 64",
        "llmcad generate --target ./Llama-2-13b --draft ./TinyLlama --memory 4GB - < letter.txt",
    ),
    "batch": (
        "llmcad batch prompts.jsonl --out results.jsonl",
        "llmcad batch prompts.jsonl --out results.jsonl --target ./Llama-2-13b --draft ./TinyLlama --temperature 0.8",
    ),
    "plan": (
        "llmcad plan",
        "llmcad plan --target ./Llama-2-13b --draft ./TinyLlama --memory 75%",
    ),
    "demo": ("llmcad demo", "llmcad demo --size 8GB --memory 2GB --max-new-tokens 32"),
    "doctor": ("llmcad doctor", "llmcad doctor --path ./Llama-2-13b --quick"),
    "models": ("llmcad models", "llmcad models --json"),
    "clean": ("llmcad clean", "llmcad clean --yes"),
    "convert": ("llmcad convert ./old-model ./model", "llmcad convert ./old-model ./model --dtype bfloat16"),
    "trace": ("llmcad trace run.trace", "llmcad trace run.trace --png run.png"),
}


def epilog(command: str) -> str:
    """Empty lines between the lines: Typer joins those that follow each other."""
    return "\n\n".join(("Examples:", *EXAMPLES[command]))
