import OpenAI from "openai";
import { run } from "./scenarios.mjs";

const client = (address) => new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
const ask = (content, more = {}) => ({ model: "demo", messages: [{ role: "user", content }], seed: 1, ...more });

await run({
  async answer(address) {
    return client(address).chat.completions.create(ask("Sort 7 3 5"));
  },
});
