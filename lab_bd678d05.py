def right(prompts, completions):
    return [1.0] * len(completions)
