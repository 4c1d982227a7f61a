"""Knowledge distillation: losses, ensembles of teachers, cached teacher scores."""
