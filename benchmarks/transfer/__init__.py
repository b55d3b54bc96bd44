"""Does composable sparse fine-tuning carry a task to languages that a model never saw?"""
