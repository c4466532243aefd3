"""The command's verbs, and the jobs that span layers; every layer is imported inside functions alone."""
