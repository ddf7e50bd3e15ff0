"""Tests of `llada_uni.demo`, in a real browser where there is one."""
