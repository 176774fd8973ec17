"""Responses to prompts: the engines that sample, and the decoders of the built-in one."""
