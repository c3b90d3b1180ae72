import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { person, question, run, weather } from "./scenarios.mjs";

const demo = (address) =>
  createOpenAICompatible({ name: "demo", baseURL: `${address}/v1`, supportsStructuredOutputs: true, includeUsage: true })(
    "demo",
  );
const tools = {
  get_weather: tool({
    description: weather.description,
    inputSchema: jsonSchema(weather.parameters),
    execute: async () => ({ sky: "sunny" }),
  }),
};
const ask = (address, prompt, more = {}) => ({ model: demo(address), prompt, seed: 1, maxRetries: 0, ...more });

await run({
  async whole(address) {
    const { text, finishReason, usage } = await generateText(ask(address, "Sort 7 3 5"));
    return { text, finishReason, tokens: usage.outputTokens };
  },

  async streamed(address) {
    const result = streamText(ask(address, "Count", { providerOptions: { demo: { reasoningEffort: "high", drafts: true } } }));
    const kinds = new Set();
    for await (const part of result.fullStream) kinds.add(part.type);
    const { outputTokens } = await result.usage;
    return {
      text: await result.text, reasoning: await result.reasoningText, kinds: [...kinds],
      finishReason: await result.finishReason, tokens: outputTokens,
    };
  },

  async tools(address) {
    const result = streamText(ask(address, "The weather?", { tools, stopWhen: stepCountIs(2) }));
    const calls = [];
    for await (const part of result.fullStream) if (part.type === "tool-call") calls.push(part.input);
    return { calls, text: await result.text };
  },

  async schema(address) {
    const { object } = await generateObject(
      ask(address, question, { schema: jsonSchema(person), maxOutputTokens: 64 }),
    );
    return object;
  },

  async error(address) {
    const failed = await generateText(ask(address, "hi ".repeat(20000))).catch((error) => error);
    return { is: APICallError.isInstance(failed), status: failed.statusCode, message: failed.message };
  },
});
