from llada_jax.config import Config

def get_config() -> Config:
    c = Config(steps=300, batch_size=16, sequence_length=128)
    c.model.layers, c.model.width, c.model.heads, c.model.kv_heads, c.model.feed_forward = 4, 192, 4, 4, 512
    c.data.input = "stdlib"; c.data.train_tokenizer=1024; c.report=True
    c.compute.unroll=0; c.compute.remat="none"
    c.optimizer.schedule=((0.0,0.0),(0.05,1.0),(1.0,0.1))
    c.validation.every=100; c.checkpoint.every=50; c.sampling.every=100; c.sampling.prompts=("def main():\n","for i in [MASK][MASK][MASK]:\n")
    return c
