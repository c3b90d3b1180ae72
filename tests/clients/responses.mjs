import OpenAI from "openai";
import { run, weather } from "./scenarios.mjs";

const responses = (address) => new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 }).responses;
const tools = [{ type: "function", strict: false, ...weather }];

await run({
  async answer(address) {
    return (await responses(address).create({ model: "demo", input: "Sort 7 3 5", seed: 1 })).output_text;
  },
  async stream(address) {
    const kinds = new Set();
    const stream = responses(address).stream({ model: "demo", input: "Count" });
    for await (const event of stream) kinds.add(event.type);
    return { text: (await stream.finalResponse()).output_text, kinds: [...kinds] };
  },
  async call(address) {
    const question = { model: "demo", input: [{ role: "user", content: "Weather?" }], tools };
    const { output } = await responses(address).stream(question).finalResponse();
    const call = output.at(-1);
    question.input.push(...output, { type: "function_call_output", call_id: call.call_id, output: "sunny" });
    return { call, answer: (await responses(address).create(question)).output_text };
  },
  async refused(address) {
    try {
      await responses(address).create({ model: "demo", input: "hi", previous_response_id: "resp_1" });
    } catch (error) {
      return { name: error.constructor.name, param: error.param };
    }
  },
});
