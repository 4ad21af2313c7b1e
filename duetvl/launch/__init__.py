"""`duetvl launch`: a run over many ranks, started by torchrun or msrun and watched until its end."""
