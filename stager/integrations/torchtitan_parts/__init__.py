"""What ``stager.integrations.torchtitan`` is made of.

contents            what a checkpoint of stager or of torchtitan has in it, and from which of a folder a training can go on
ranks               what the ranks agree on: what rank 0 sees, whether a checkpoint is damaged on any of them
targets             what a load fills: the whole state of a training, or a model whose dtype was another one
hf_export           the last step's weights in the layout of Hugging Face
hf_weights          loading weights in that layout, from all files of a directory
export_directory    where an export lies until it has its name, and what becomes of what had the name
others              ``keep_latest_k`` for the checkpoints that torchtitan's own manager has left
"""
