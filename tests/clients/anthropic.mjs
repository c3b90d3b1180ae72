import Anthropic from "@anthropic-ai/sdk";
import { run, weather } from "./scenarios.mjs";

const client = (address) => new Anthropic({ baseURL: address, apiKey: "none", maxRetries: 0 });
const ask = (content, more = {}) => ({
  model: "demo",
  max_tokens: 1000,
  messages: [{ role: "user", content }],
  ...more,
});
const { parameters, ...named } = weather;
const tools = [{ ...named, input_schema: parameters }];

await run({
  async answer(address) {
    const messages = client(address).messages;
    const question = ask("Sort 7 3 5", { seed: 1 });
    const { input_tokens: counted } = await messages.countTokens({ model: "demo", messages: question.messages });
    return { answer: await messages.create(question), counted };
  },
  async stream(address) {
    const stream = client(address).messages.stream(ask("Count"));
    let text = "";
    stream.on("text", (delta) => (text += delta));
    return { text, final: await stream.finalMessage(), streamed: text };
  },
  async call(address) {
    const messages = client(address).messages;
    const question = ask("The weather?", { tools });
    const answer = await messages.stream(question).finalMessage();
    const call = answer.content.at(-1);
    question.messages.push(
      { role: "assistant", content: answer.content },
      { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "sunny" }] },
    );
    return { call, answer: await messages.create(question) };
  },
  async refused(address) {
    try {
      await client(address).messages.create(ask("hi ".repeat(5000)));
    } catch (error) {
      return { name: error.constructor.name, type: error.type, message: error.message };
    }
  },
});
