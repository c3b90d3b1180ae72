import OpenAI from "openai";
import { person, question, run, weather } from "./scenarios.mjs";

const chat = (address) => new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 }).chat.completions;
const ask = (content, more = {}) => ({ model: "demo", messages: [{ role: "user", content }], seed: 1, ...more });
const tools = [{ type: "function", function: weather }];

await run({
  whole: (address) => chat(address).create(ask("Sort 7 3 5")),

  async streamed(address) {
    const more = { stream_options: { include_usage: true }, drafts: true }; // the library ignores drafts
    const stream = chat(address).stream(ask("Sort 7 3 5", more));
    return stream.finalChatCompletion();
  },

  async tools(address) {
    const first = await chat(address).stream(ask("The weather?", { tools })).finalChatCompletion();
    const { message } = first.choices[0];
    const [call] = message.tool_calls;
    const messages = [
      { role: "user", content: "The weather?" },
      message,
      { role: "tool", tool_call_id: call.id, content: JSON.stringify({ sky: "sunny" }) },
    ];
    const last = await chat(address).create({ model: "demo", messages, tools });
    return { call: call.function, reason: first.choices[0].finish_reason, text: last.choices[0].message.content };
  },

  async schema(address) {
    const response_format = { type: "json_schema", json_schema: { name: "person", strict: true, schema: person } };
    const answer = await chat(address).create(
      ask(question, { response_format, max_tokens: 64 }),
    );
    return answer.choices[0].message.content;
  },

  async error(address) {
    const failed = await chat(address).create(ask("hi ".repeat(20000))).catch((error) => error);
    return { is: failed instanceof OpenAI.BadRequestError, code: failed.code, param: failed.param };
  },

  async leave(address) {
    const stream = await chat(address).create(ask("Count", { stream: true }));
    for await (const _ of stream) break;
    const answer = await chat(address).create(ask("Count"));
    return answer.choices[0].message.content;
  },
});
