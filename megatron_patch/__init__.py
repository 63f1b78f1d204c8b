"""Megatron-core: MuSe as the core attention of GPT layers, from a layer spec or from the command line of Megatron-LM.

    torchrun ... -m muse_dist.megatron_patch pretrain_gpt.py --attention muse --muse-block 4096 ...
    torchrun ... pretrain_gpt.py --spec muse_dist.megatron_patch.spec muse_layer_spec ...
    spec = muse_dist.megatron_patch.spec.use_muse(get_gpt_layer_local_spec(...), MuseConfig(...), layers=range(2, 31))

The first is for Megatron-LM (launch/megatron.sh), the second for Megatron-LM with nothing patched and the default
settings, the third for scripts of your own on megatron-core alone.

This module imports nothing: the launcher must first find the checkout whose megatron.core is to be used.
"""
